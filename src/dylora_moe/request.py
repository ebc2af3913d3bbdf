"""What one call of the mixture asks for, and what its latest pass decided.

Shapes: B batch, S sequence, E experts, n router outputs (E, plus one with a base route).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BASE = "base"


@dataclass
class Request:
    """One `forward` (one pass) or one `generate` (a pass per token).

    Attributes:
        experts: an expert's name or `"base"` for all rows; one entry per row, None meaning routed; or None.
        weights: caller-given `[B or 1, S or 1, E]`.
        attention_mask: `[B, S]` as the caller gave it; a static cache hands the decoder a 4-D mask.
        labels: `[B, S]`, which tell sequence granularity where the prompt ends.
        prompt_length: in `generate`, the number of prompt positions.
        held: router scores `[B, 1, n]` held for a whole sequence.
        one_hot: `[B or 1, 1, E]` of `experts` where every row is forced, for compiled graphs.
        fold: fold the fixed mixture into the weights for the length of the generation.
    """

    experts: str | Sequence[str | None] | None = None
    weights: Tensor | None = None
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    prompt_length: int | None = None
    packed_rows: bool = False
    held: Tensor | None = None
    one_hot: Tensor | None = field(default=None, repr=False)
    fold: bool = False
    decision: Decision | None = field(default=None, repr=False)


@dataclass
class Decision:
    """How one pass is routed.

    Attributes:
        batch, length: B and S of the pass.
        mask: `[B, S]` bool of the real tokens, or None if all are.
        columns: per row the forced column, -1 for the base, None for a routed row; None if all rows are routed.
        pending: the router has yet to read the hidden state.
        logits: `[B, S, n]` router scores, −inf for experts that are not routed yet.
        shares: `[B, S, n]` after the policy, the base route included.
        weights: `[B, S, E]` what the layers multiply by.
    """

    batch: int
    length: int
    mask: Tensor | None = None
    columns: list[int | None] | None = None
    pending: bool = False
    logits: Tensor | None = None
    shares: Tensor | None = None
    weights: Tensor | None = None

    @property
    def forced(self) -> bool:
        """Whether every row is forced."""
        return self.columns is not None and None not in self.columns

    def routed_mask(self, device: torch.device) -> Tensor | None:
        """`[B, S]` bool of the real tokens in routed rows, or None if all are: what losses and load count."""
        mask = None if self.mask is None else self.mask.to(device)
        if self.columns is None:
            return mask
        rows = torch.tensor([c is None for c in self.columns], device=device)[:, None].expand(-1, self.length)
        return rows if mask is None else rows & mask


def check_experts(experts: Any, names: Sequence[str], batch: int | None) -> str | list[str | None] | None:
    """Validate the `experts=` argument of a call.

    Raises:
        ValueError: an unknown name, or not one entry per row.
    """
    if experts is None:
        return None
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
    """Batch and length of a model call, from whichever input it was given."""
    for value in (*args[:1], *(kwargs.get(key) for key in ("input_ids", "inputs", "inputs_embeds"))):
        if isinstance(value, Tensor):
            return value.shape[0], value.shape[1]
    return None, None


class CallLock:
    """A re-entrant lock that may be copied and pickled with its model: a copy gets a lock of its own.

    Routing is per model, so two threads must not be inside one model at the same time; they take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other thread is inside; a compiled graph takes no lock."""
        if torch.compiler.is_compiling():
            yield
            return
        with self._lock:
            yield

    def __deepcopy__(self, memo: dict) -> CallLock:
        return CallLock()

    def __reduce__(self) -> tuple:
        return CallLock, ()


def has_packed_rows(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a call say that one row holds several sequences."""
    if any(kwargs.get(key) is not None for key in ("seq_idx", "cu_seq_lens_q", "cu_seqlens")):
        return True
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor):
        return False
    starts = positions == 0
    if attention_mask is not None and attention_mask.shape == starts.shape:
        starts = starts & attention_mask.bool()  # generate gives padding position 0, too
    return bool((starts.sum(-1) > 1).any())
