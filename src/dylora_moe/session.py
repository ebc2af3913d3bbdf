"""A loaded checkpoint with its tokenizer and prompt format: text in, text and routing out.

Shapes: S tokens, E experts.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .base.loading import load_tokenizer
from .checkpoint.files import CheckpointError
from .data.examples import Example, encode_prompt
from .model import DyLoraMoE
from .routing.granularity import GRANULARITIES
from .routing.trace import RoutingTrace
from .schema import parse_yaml


class Answer(NamedTuple):
    """A text and who wrote each of its tokens.

    Attributes:
        text: the completion, stripped; or the text that was routed.
        tokens: what each token, of the prompt too, adds to the whole text, S of them; joined they are that text.
        weights: `[S, E]`: row t are the weights of the pass that predicted token t, which read token t-1. Nothing
            predicted the first: its row is NaN.
        prompt_length: how many of the tokens are the prompt.
        trace: the whole trace, of what was read.
    """

    text: str
    tokens: list[str]
    weights: Tensor
    prompt_length: int
    trace: RoutingTrace


class Session:
    """One checkpoint, ready to answer.

    Args:
        directory: the checkpoint's folder or hub id.
        base: overrides the base it names.
        base_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Attributes:
        model: the mixture.
        tokenizer: the checkpoint's own, or its base's.
        chat: whether prompts go through the chat template: as the checkpoint says, or the recipe beside an older one.
    """

    def __init__(self, directory: str | Path, base: str | None = None, **base_kwargs: Any):
        self.model = DyLoraMoE.from_pretrained(str(directory), base=base, **base_kwargs)
        folder = self.model.folder or directory
        self.tokenizer: Any = load_tokenizer(folder, base or self.model.base_name)
        self.chat = prompts_are_chats(folder, self.model.chat)

    def set_top_k(self, k: int) -> None:
        """Keep the best `k` experts per token."""
        if k > self.model.router.num_outputs:
            raise ValueError(f"top_k={k}: the mixture has {self.model.num_experts} experts.")
        self.model.moe_config.top_k = k

    def complete(
        self,
        prompt: str,
        experts: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        fold: bool = False,
    ) -> str:
        """The completion of `prompt`, stripped; greedy at temperature 0.

        Args:
            prompt: the text.
            experts: force an expert by name, `"base"` for none.
            max_new_tokens: where it stops at the latest.
            temperature: of the sampling.
            fold: fold the mixture into the base's weights meanwhile, see `DyLoraMoE.generate`.

        Raises:
            ValueError: an empty prompt, an unknown expert, or `fold` where every token is routed by itself.
        """
        inputs = self._encode(prompt)
        return self._completion(inputs, self._generate(inputs, experts, max_new_tokens, temperature, fold))

    def answer(
        self,
        prompt: str,
        experts: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        fold: bool = False,
    ) -> Answer:
        """As `complete`, with the routing of every token."""
        inputs = self._encode(prompt)
        with self.model.trace() as trace:
            ids = self._generate(inputs, experts, max_new_tokens, temperature, fold)
        return self._answer(self._completion(inputs, ids), ids, inputs["input_ids"].shape[1], trace)

    def route(self, text: str) -> Answer:
        """Route `text` without generating."""
        inputs = self._encode(text)
        ids = inputs["input_ids"][0]
        with torch.no_grad(), self.model.trace() as trace:
            self.model(**inputs)
        return self._answer(text, ids, len(ids), trace)

    def backward(self, text: str) -> None:
        """One backward pass of the language-model loss on `text`, for a gradient report.

        Where the prompt decides for the sequence, the first half of the text is the prompt.
        """
        inputs = self._encode(text)
        labels = inputs["input_ids"].clone()
        if GRANULARITIES[self.model.moe_config.granularity].per_sequence:
            labels[:, : (labels.shape[1] + 1) // 2] = -100
        self.model.zero_grad()
        self.model(**inputs, labels=labels).loss.backward()

    def _encode(self, text: str) -> dict[str, Tensor]:
        if not text:
            raise ValueError("the prompt is empty; there is nothing to route.")
        ids = torch.tensor([encode_prompt(Example(text, ""), self.tokenizer, self.chat)], device=self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _generate(
        self, inputs: dict[str, Tensor], experts: str | None, max_new_tokens: int, temperature: float, fold: bool
    ) -> Tensor:
        """The ids `[S]` of prompt and completion."""
        if fold and experts is None and not GRANULARITIES[self.model.moe_config.granularity].per_sequence:
            raise ValueError(
                "fold does not apply: this checkpoint routes every token by itself. Force one expert "
                f"({', '.join(self.model.expert_names)}), or leave it out."
            )
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        pad = self.tokenizer.pad_token_id
        output = self.model.generate(
            **inputs,
            experts=experts,
            fold=fold,
            max_new_tokens=max_new_tokens,
            num_beams=1,  # the trace is read as one row, each position once
            use_cache=True,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            eos_token_id=self.tokenizer.eos_token_id,
            **sampling,
        )
        return output[0]

    def _completion(self, inputs: dict[str, Tensor], ids: Tensor) -> str:
        return self.tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _answer(self, text: str, ids: Tensor, prompt_length: int, trace: RoutingTrace) -> Answer:
        read = trace.weights[0]
        predicted = torch.cat([torch.full_like(read[:1], torch.nan), read[: len(ids) - 1]])
        return Answer(text, pieces(self.tokenizer, ids.tolist()), predicted, prompt_length, trace)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the decoded text; joined they are that text.

    A token alone may lose its space (SentencePiece), and a character of several tokens belongs to the last of them.
    """

    def decoded(count: int) -> str:
        return str(tokenizer.decode(list(ids[:count]), clean_up_tokenization_spaces=False))

    text = decoded(len(ids))
    ends = [*accumulate((_shared(text, decoded(count)) for count in range(len(ids))), max), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def _shared(one: str, other: str) -> int:
    """How many letters two texts both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def prompts_are_chats(directory: str | Path, said: bool | None) -> bool:
    """Whether prompts go through the chat template: as the checkpoint `said`, or the recipe beside an older one.

    Raises:
        CheckpointError: a recipe that cannot be read.
    """
    return _chat_in_recipe(Path(directory)) if said is None else said


def _chat_in_recipe(directory: Path) -> bool:
    """Whether the mixture was trained on chat prompts, as the recipe beside an older checkpoint tells."""
    file = directory / "recipe.yaml"
    if not file.is_file():
        return False
    try:
        recipe = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read, which tells whether prompts are chats: {error}") from error
    base = recipe.get("base") if isinstance(recipe, dict) else None
    return bool(base.get("chat")) if isinstance(base, dict) else False
