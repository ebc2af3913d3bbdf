"""A base whose vocabulary was resized after it was loaded by its name: the rows it gained travel with the checkpoint.

Shapes: V rows of the embeddings, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora_moe.base.embedded import EMBEDDED
from dylora_moe.sharding import whole


class Vocabulary(NamedTuple):
    """How many rows the embeddings of a base have.

    Attributes:
        rows: V; None if it is not known.
        named_rows: V of the base that its name stands for; None if it is not known.
    """

    rows: int | None = None
    named_rows: int | None = None

    @property
    def resized(self) -> bool:
        """Whether the base is not what its name stands for."""
        return self.named_rows is not None and self.rows is not None and self.rows != self.named_rows

    @property
    def added(self) -> int:
        """Rows that a checkpoint must hold."""
        return max(0, (self.rows or 0) - (self.named_rows or 0)) if self.resized else 0


def rows_of(base: PreTrainedModel) -> int | None:
    """V of a base, with or without experts."""
    weight = getattr(_bare(base.get_input_embeddings()), "weight", None)
    return None if weight is None else getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves a shape of [0]


def rows_by_name(base: PreTrainedModel, name: str | None) -> int | None:
    """V of the base that was loaded from `name`, by the configuration there; None where no local file says it."""
    name = getattr(base, "name_or_path", "") or name
    if not name or name == EMBEDDED:
        return None
    revision = getattr(base.config, "_commit_hash", None) or "main"
    try:
        config = type(base.config).from_pretrained(name, local_files_only=True, revision=revision)
    except (OSError, ValueError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def resize_as_saved(base: PreTrainedModel, saved: Vocabulary) -> None:
    """Give a base that was loaded by its name the rows it had when the mixture was saved."""
    if saved.resized and rows_of(base) == saved.named_rows:
        base.resize_token_embeddings(saved.rows, mean_resizing=False)


def added_rows(base: PreTrainedModel, count: int) -> dict[str, Tensor]:
    """The last `count` rows of embeddings and head, whole; a head tied to the embeddings has none of its own.

    Where processes share the base in shards, every one of them must call.
    """
    return {key: whole(tensor.data)[-count:] for key, tensor in _parts(base).items()} if count else {}


def put_rows(base: PreTrainedModel, rows: Mapping[str, Tensor]) -> None:
    """Copy checked rows into the end of embeddings and head."""
    parts = _parts(base)
    with torch.no_grad():
        for key, value in rows.items():
            parts[key][-len(value) :].copy_(value)


def row_shapes(base: PreTrainedModel, count: int) -> dict[str, tuple]:
    """Shapes of what `added_rows` returns."""
    return {key: (count, *tensor.shape[1:]) for key, tensor in _parts(base).items()} if count else {}


def whole_embeddings(base: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings and head by the keys that stock PEFT writes beside the `tensors` of an adapter on a resized base."""
    paths = {id(module): path for path, module in base.named_modules()}
    found = {}
    for key, tensor in _parts(base).items():
        side, _, kind = key.partition(".")
        module: Any = base.get_input_embeddings() if side == "input" else base.get_output_embeddings()
        prefix = f"base_model.model.{paths[id(module)]}"
        adapted = any(name.startswith(f"{prefix}.lora_") for name in tensors)
        found[f"{prefix}.{'base_layer.' if adapted else ''}{kind}"] = tensor.data
    return found


def _parts(base: PreTrainedModel) -> dict[str, Tensor]:
    """What has a row per token: `input.weight`, `output.weight` `[V, D]` (unless tied), `output.bias` `[V]`."""
    embeddings, head = _bare(base.get_input_embeddings()), _bare(base.get_output_embeddings())
    parts = {"input.weight": getattr(embeddings, "weight", None)}
    if head is not None and getattr(head, "weight", None) is not parts["input.weight"]:
        parts["output.weight"] = getattr(head, "weight", None)
    parts["output.bias"] = getattr(head, "bias", None)
    return {key: tensor for key, tensor in parts.items() if tensor is not None and tensor.shape[0] == rows_of(base)}


def _bare(module: nn.Module | None) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
