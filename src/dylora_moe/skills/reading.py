"""How texts become the rows of a skill, and a note of how they did: sums of what was read otherwise do not mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.examples import Example, encode, encode_prompt

from .features import Row

SEPARATOR = Example.separator
_SAMPLE = 1024  # values of every tensor of the base that its hash looks at


@dataclass(frozen=True)
class Reading:
    """How the texts of a library were read.

    Attributes:
        base: a hash of the base's weights, as they are loaded.
        dtype: theirs.
        quantization: what the base's configuration says of it; empty for none.
        layer: k, of the layer whose input is read.
        width: D.
        tokenizer: a hash of the tokenizer.
        separator: what stood between prompt and completion where no chat template was used.
        chat_template: a hash of the chat template that prompts went through; empty for plain text.
    """

    base: str
    dtype: str
    quantization: str
    layer: int
    width: int
    tokenizer: str
    separator: str = SEPARATOR
    chat_template: str = ""

    @classmethod
    def of(
        cls, base: Any, layer: int, tokenizer: PreTrainedTokenizerBase, separator: str = SEPARATOR, chat: bool = False
    ) -> Reading:
        """The note for a base, with or without experts, the router's layer, and how texts are formatted."""
        return cls(
            **_states(base),
            layer=layer,
            tokenizer=_hash(_behaviour(tokenizer)),
            separator=separator,
            chat_template=_hash(str(tokenizer.chat_template)) if chat else "",
        )

    def check_same_states(self, base: Any, layer: int) -> None:
        """Raise `ValueError` if texts were read with another base than `base`, or at another layer than `layer`."""
        own = replace(self, **_states(base), layer=layer)
        if self != own:
            raise ValueError(
                f"this mixture and the library's read texts in another way ({'; '.join(own.differences(self))}); its "
                "sums are of use only to mixtures on the same base, with the same router_layer."
            )

    def has_other_weights(self, base: Any) -> bool:
        """Whether a base surely has other weights; in another dtype or quantization the same ones look different.

        One without values (on the device `meta`) surely has no others.
        """
        same_kind = (self.dtype, self.quantization) == (_dtype(base), _quantization(base.config))
        return same_kind and base.device.type != "meta" and self.base != _hash_of_weights(base)

    def differences(self, other: Reading) -> list[str]:
        """What differs, for messages."""
        ours, theirs = asdict(self), asdict(other)
        return [f"{key.replace('_', ' ')} {ours[key]!r}, {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]


def _states(base: Any) -> dict[str, Any]:
    """What of a base decides the states, by the names in `Reading`."""
    return {
        "base": _hash_of_weights(base),
        "dtype": _dtype(base),
        "quantization": _quantization(base.config),
        "width": base.config.get_text_config().hidden_size,
    }


def _hash_of_weights(base: Any) -> str:
    weights = [(n.replace(".base_layer.", "."), p) for n, p in base.named_parameters() if ".lora_" not in n]
    digest = hashlib.sha256()
    for name, parameter in sorted(weights):
        sample = parameter.detach().flatten()[:_SAMPLE].contiguous().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _dtype(base: Any) -> str:
    embeddings: nn.Module = base.get_input_embeddings()
    return str(next(embeddings.parameters()).dtype).removeprefix("torch.")


def read_rows(
    rows: Iterable[str | Mapping[str, Any] | Example],
    tokenizer: PreTrainedTokenizerBase,
    separator: str = SEPARATOR,
    chat: bool = False,
    unanswered: bool = False,
) -> list[Row]:
    """The token ids of some texts, as training would see them.

    Args:
        rows: plain texts; mappings with `prompt` and `completion`; or examples, which have their own separator.
        tokenizer: of the base.
        separator: what the completion begins with where no chat template is used.
        chat: whether prompts go through the chat template.
        unanswered: take mappings with a `prompt` alone as well, all of which is prompt.

    Raises:
        ValueError: no rows, a row of another form, or one with nothing in it; the message says which.
    """
    examples, found = examples_of(rows, separator, unanswered), []
    check_plain(examples, chat)
    for number, example in enumerate(examples, start=1):
        if example.prompt and not example.completion:
            ids = encode_prompt(example, tokenizer, chat)
            prompt = len(ids)
        else:
            ids, prompt = encode(example, tokenizer, chat)
        if len(ids) < 2:
            raise ValueError(f"{example.place or f'row {number}'} has {len(ids)} tokens; at least two are needed.")
        found.append(Row(ids, prompt))
    return found


def examples_of(
    rows: Iterable[str | Mapping[str, Any] | Example], separator: str = SEPARATOR, unanswered: bool = False
) -> list[Example]:
    """Texts, mappings with `prompt` and `completion`, and examples, as examples; `unanswered`: a `prompt` alone, too.

    Raises:
        ValueError: no rows, a row of another form, or one with nothing in it; the message says which.
    """
    if isinstance(rows, (str, Mapping)):
        raise ValueError(f"rows={rows!r:.60}: a list of texts is needed, not one.")
    found = [_example(given, separator, f"row {number}", unanswered) for number, given in enumerate(rows, start=1)]
    if not found:
        raise ValueError("no rows were given; at least one text is needed.")
    return found


def check_plain(examples: Iterable[Example], chat: bool) -> None:
    """Raise `ValueError` if one is made of chat messages where `chat` does not say that a template takes them."""
    for number, example in enumerate(examples, start=1):
        if not chat and (isinstance(example.prompt, list) or isinstance(example.completion, dict)):
            raise ValueError(
                f"{example.place or f'row {number}'} is made of chat messages, but the mixture's prompts are plain; "
                "give text, or set model.chat = True (compose: --chat) before anything is taught."
            )


def digest_of(rows: Iterable[Row]) -> str:
    """A hash of the tokens of some rows, in their order."""
    return _hash(json.dumps([[row.prompt, list(map(int, row.ids))] for row in rows]), 64)


def _example(given: Any, separator: str, place: str, unanswered: bool) -> Example:
    if unanswered and isinstance(given, Mapping) and "completion" not in given and given.get("prompt"):
        given = Example(given["prompt"], "", separator=separator, place=place)
        if not isinstance(given.prompt, (str, list)):
            raise ValueError(f"{place}: 'prompt' is {given.prompt!r:.60}; expected text.")
    if isinstance(given, Example):
        return given
    if isinstance(given, str):
        example = Example("", given, place=place)
    elif isinstance(given, Mapping) and {"prompt", "completion"} <= set(given):
        example = Example(given["prompt"], given["completion"], separator=separator, place=place)
    else:
        raise ValueError(f"{place} is {given!r:.60}; expected a text, or an object with 'prompt' and 'completion'.")
    for key, part in (("prompt", example.prompt), ("completion", example.completion)):
        if not isinstance(part, (str, list if key == "prompt" else dict)):
            raise ValueError(f"{place}: {key!r} is {part!r:.60}; expected text.")
    if not example.completion or (isinstance(example.completion, str) and not example.completion.strip()):
        raise ValueError(f"{place} is empty.")
    return example


def _behaviour(tokenizer: PreTrainedTokenizerBase) -> str:
    """What of a tokenizer decides the ids; how it pads and truncates does not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(sorted(tokenizer.get_vocab().items()))
    whole = json.loads(backend.to_str())
    return json.dumps({key: value for key, value in whole.items() if key not in ("padding", "truncation")})


def _quantization(config: Any) -> str:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return ""
    plain = settings if isinstance(settings, Mapping) else settings.to_dict()
    kept = {key: value for key, value in plain.items() if key in ("quant_method", "bits") or key.startswith("load_in")}
    return json.dumps(kept, sort_keys=True, default=str)


def _hash(text: str, length: int = 16) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]
