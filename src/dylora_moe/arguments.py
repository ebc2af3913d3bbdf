"""What a caller may pass to `forward` and `generate`, checked; both halves and `enable_routing` share these checks.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = "base"


def check_experts(experts: Any, names: Sequence[str], batch: int | None) -> str | list[str | None] | None:
    """Validate the `experts=` argument of a call.

    Raises:
        TypeError: neither a name nor a list of them.
        ValueError: an unknown name, or not one entry per row.
    """
    if experts is None:
        return None
    if not isinstance(experts, Sequence):
        raise TypeError(f"experts={experts!r:.60}: pass one name for all rows, or a list with one name per row.")
    known = (*names, BASE)
    entries: list[str | None] = [experts] if isinstance(experts, str) else list(experts)
    for name in entries:
        if name is not None and name not in known:
            raise ValueError(f"unknown expert {name!r}; the experts are {', '.join(names)} (or {BASE!r} for none).")
    if isinstance(experts, str):
        return experts
    if batch is not None and len(entries) != batch:
        raise ValueError(f"experts has {len(entries)} entries for a batch of {batch} rows; give one name per row.")
    return entries


def check_weights(weights: Any, num_experts: int, batch: int | None, length: int | None) -> Tensor:
    """Bring caller-given weights to `[B or 1, S or 1, E]`.

    Args:
        weights: `[E]`, `[B, E]` or `[B, S, E]`, any float dtype.
        num_experts: E.
        batch, length: B and S of the input if known; `length=None` refuses `[B, S, E]` (generation).

    Raises:
        TypeError: not a float tensor.
        ValueError: wrong shape or a value that is not finite.
    """
    accepted = f"[{num_experts}] or [batch, {num_experts}]" + (
        f" or [batch, sequence, {num_experts}]" if length else ""
    )
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"routing_weights must be a float tensor of shape {accepted}, not {weights!r:.80}.")
    shape = tuple(weights.shape)
    given = weights
    if weights.dim() == 1:
        weights = weights[None, None]
    elif weights.dim() == 2:
        weights = weights[:, None]
    fits = given.dim() in ((1, 2, 3) if length else (1, 2)) and shape[-1] == num_experts
    if fits and batch is not None:
        fits = weights.shape[0] == batch if given.dim() > 1 else True
    if not fits or (given.dim() == 3 and weights.shape[1] != length):
        raise ValueError(
            f"routing_weights has shape {list(shape)}; expected {accepted}"
            + (f" with batch={batch}" if batch is not None else "")
            + (f" and sequence={length}." if length else ".")
        )
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(weights.detach()).all()):
        raise ValueError("routing_weights holds values that are not finite (NaN or infinity).")
    return weights


def input_shape(args: Any, kwargs: Any) -> tuple[int | None, int | None]:
    """Batch and length of a model call, from whichever input it was given.

    Raises:
        TypeError: text, lists or a whole batch in place of a tensor.
        ValueError: a single row without its batch dimension.
    """
    given = [("input_ids", value) for value in args[:1]]
    given += [(key, kwargs.get(key)) for key in ("input_ids", "inputs", "inputs_embeds")]
    for key, value in given:
        if value is None:
            continue
        check_are_tensors(**{key: value})
        if value.dim() < 2:
            raise ValueError(f"{key} has shape {list(value.shape)}; expected [batch, sequence, …]: pass {key}[None].")
        return value.shape[0], value.shape[1]
    return None, None


def check_are_tensors(**values: Any) -> None:
    """Raise `TypeError` for a value that a tokenizer gives as a tensor and that is text, a list or a whole batch."""
    for key, value in values.items():
        if isinstance(value, (str, list, tuple)):
            raise TypeError(f'{key} must be a tensor, not {value!r:.60}; tokenizer(…, return_tensors="pt") gives one.')
        if isinstance(value, Mapping) and key != "attention_mask":  # of which transformers knows one per kind of layer
            raise TypeError(f"{key} must be a tensor, not a {type(value).__name__}; unpack a batch: model(**batch).")


def packed_rows(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool | Tensor:
    """Whether the arguments of a call say that one row holds several sequences; a bool scalar if their values do."""
    if any(kwargs.get(key) is not None for key in ("seq_idx", "cu_seq_lens_q", "cu_seqlens")):
        return True
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor):
        return False
    starts = positions == 0
    if attention_mask is not None and attention_mask.shape == starts.shape:
        starts = starts & attention_mask.bool()  # generate gives padding position 0, too
    return (starts.sum(-1) > 1).any()


def sequence_starts(kwargs: dict[str, Any], length: int) -> Tensor | None:
    """Where another sequence begins within a row, `[B or 1, S]` bool, after the arguments of a call.

    That is at the boundaries it names, and where positions do not go on; None where it says nothing.
    """
    starts: list[Tensor] = []
    for key in ("cu_seq_lens_q", "cu_seqlens"):
        ends = kwargs.get(key)
        if isinstance(ends, Tensor):
            starts.append(torch.isin(torch.arange(length, device=ends.device), ends)[None])
    positions, rows = kwargs.get("position_ids"), kwargs.get("seq_idx")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        starts.append(F.pad(positions[:, 1:] <= positions[:, :-1], (1, 0)))
    if isinstance(rows, Tensor):
        starts.append(F.pad(rows[:, 1:] != rows[:, :-1], (1, 0)))
    return functools.reduce(torch.logical_or, starts) if starts and length > 1 else None


def exits_early(args: Any, kwargs: Any, default: Any) -> bool:
    """Whether a call of `generate` drafts with the lower layers of the model itself.

    Args:
        args, kwargs: of the call.
        default: the model's own generation configuration.
    """
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or default
    return kwargs.get("assistant_early_exit", getattr(given, "assistant_early_exit", None)) is not None


def repeat_rows(tensor: Tensor, batch: int) -> Tensor:
    """Repeat the rows of `tensor [B, …]` for beams; a single row stands for all."""
    rows = tensor.shape[0]
    return tensor if rows in (1, batch) or batch % rows else tensor.repeat_interleave(batch // rows, dim=0)
