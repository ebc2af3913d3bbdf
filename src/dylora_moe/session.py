"""A loaded checkpoint with its tokenizer and prompt format: text in, text and routing out.

Shapes: S sequence, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from .base.embedded import resolve_base
from .data.examples import Example, encode_prompt
from .model import DyLoraMoE
from .routing.trace import RoutingTrace
from .schema import RecipeError, check_mapping, parse_yaml


class Answer(NamedTuple):
    """Generated text and how every token, prompt included, was routed.

    Attributes:
        text: the completion, stripped.
        tokens: the text of every routed token, S of them.
        weights: `[S, E]`.
        trace: the whole trace.
    """

    text: str
    tokens: list[str]
    weights: Tensor
    trace: RoutingTrace


class Session:
    """One checkpoint, ready to answer.

    Args:
        directory: the checkpoint's folder.
        base: overrides the base it names.
    """

    def __init__(self, directory: str | Path, base: str | None = None):
        self.model = DyLoraMoE.from_pretrained(str(directory), base=base)
        own = (Path(directory) / "tokenizer_config.json").is_file()
        source = directory if own else resolve_base(base or self.model.base_name or "")
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.chat = _wants_chat(Path(directory))

    def set_top_k(self, k: int) -> None:
        """Keep the best `k` experts per token."""
        if k > self.model.router.num_outputs:
            raise ValueError(f"top_k={k}: the mixture has {self.model.num_experts} experts.")
        self.model.moe_config.top_k = k

    def answer(
        self, prompt: str, experts: str | None = None, max_new_tokens: int = 128, temperature: float = 0.0
    ) -> Answer:
        """Generate a completion of `prompt`; greedy at temperature 0."""
        inputs = self._encode(prompt)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        pad = self.tokenizer.pad_token_id
        with self.model.trace() as trace:
            output = self.model.generate(
                **inputs,
                experts=experts,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                eos_token_id=self.tokenizer.eos_token_id,
                **sampling,
            )
        text = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return self._result(text, output[0], trace)

    def route(self, text: str) -> Answer:
        """Route `text` without generating."""
        inputs = self._encode(text)
        with torch.no_grad(), self.model.trace() as trace:
            self.model(**inputs)
        return self._result(text, inputs["input_ids"][0], trace)

    def backward(self, text: str) -> None:
        """One backward pass of the language-model loss on `text`, for a gradient report."""
        inputs = self._encode(text)
        self.model.zero_grad()
        self.model(**inputs, labels=inputs["input_ids"]).loss.backward()

    def _encode(self, text: str) -> dict[str, Tensor]:
        if not text:
            raise ValueError("the prompt is empty; there is nothing to route.")
        ids = torch.tensor([encode_prompt(Example(text, ""), self.tokenizer, self.chat)], device=self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _result(self, text: str, ids: Tensor, trace: RoutingTrace) -> Answer:
        weights = trace.weights[0]
        tokens = [self.tokenizer.decode([i]) for i in ids[: len(weights)].tolist()]
        return Answer(text, tokens, weights, trace)


def _wants_chat(directory: Path) -> bool:
    """Whether the mixture was trained on chat prompts, as the recipe beside it tells."""
    file = directory / "recipe.yaml"
    if not file.is_file():
        return False
    try:
        recipe = check_mapping(parse_yaml(file.read_text(encoding="utf-8"), str(file)), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read: {error}") from error
    return bool(check_mapping(recipe.get("base"), f"{file}: base").get("chat"))
