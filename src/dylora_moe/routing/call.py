"""What one call of the mixture asks for.

Shapes: B batch, S sequence, E experts, n router outputs (E, plus one with a base route).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dylora_moe.arguments import BASE, repeat_rows

from .decision import Decision, Rows
from .granularity import Granularity
from .trace import RoutingTrace


@dataclass
class Call:
    """One `forward` (one pass) or one `generate` (a pass per token).

    Attributes:
        experts: an expert's name or `"base"` for all rows; one entry per row, None meaning routed; or None.
        weights: caller-given `[B or 1, S or 1, E]`.
        attention_mask: `[B, S]` as the caller gave it; a static cache hands the decoder a 4-D mask.
        labels: `[B, S]`, which tell sequence granularity where the prompt ends.
        prompt_length: in `generate`, the number of prompt positions.
        trace: what records its passes.
        held: scores `[B, 1, n]` held for a whole sequence.
        one_hot: `[B or 1, 1, E]` of `experts` where every row is forced, for compiled graphs.
        fold: fold the fixed mixture into the weights for the length of the generation.
        decision: that of its latest pass.
    """

    experts: str | Sequence[str | None] | None = None
    weights: Tensor | None = None
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    prompt_length: int | None = None
    trace: RoutingTrace | None = field(default=None, repr=False)
    held: Tensor | None = None
    one_hot: Tensor | None = field(default=None, repr=False)
    fold: bool = False
    decision: Decision | None = field(default=None, repr=False)

    @property
    def decided(self) -> bool:
        """Whether the caller made the decision for every row."""
        return self.weights is not None or self.one_hot is not None

    def rows(self, batch: int, length: int, mask: Any, names: Sequence[str], seen: int | Tensor | None = None) -> Rows:
        """What is known of a pass over `batch` rows of `length` tokens before anything is decided.

        Args:
            batch, length: B and S of the pass.
            mask: what the decoder was given as its attention mask.
            names: the experts.
            seen: positions before this pass, if they are known.
        """
        given = self.weights is not None or (torch.compiler.is_compiling() and self.one_hot is not None)
        columns = None if given else columns_of(self.experts, names, batch)  # a graph must not depend on the names
        return Rows(batch, length, self._real_tokens(mask, batch, length, seen), columns)

    def mask_of(self, kwargs: dict[str, Any]) -> Tensor | None:
        """The 2-D attention mask: the decoder's, or where that is none the caller's."""
        mask = kwargs.get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else self.attention_mask

    def _real_tokens(self, mask: Any, batch: int, length: int, seen: int | Tensor | None) -> Tensor | None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = self.attention_mask
            if seen is not None and isinstance(mask, Tensor) and mask.dim() == 2:  # what comes after it is real
                at = torch.arange(length, device=mask.device) + (seen.to(mask) if isinstance(seen, Tensor) else seen)
                last = mask.shape[1] - 1
                return repeat_rows(mask[:, at.clamp(max=last)].bool() | (at > last), batch)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < length:
            return None
        return repeat_rows(mask[:, -length:].bool(), batch)

    def prompt_tokens(self, rows: Rows, device: torch.device) -> Tensor:
        """`[B, S]` bool: the real tokens that decide the routing of their sequence.

        Raises:
            ValueError: the prompt is not all there, or nothing tells where it ends.
        """
        advice = 'granularity="token" has no such limit.'
        prompt = torch.ones(rows.batch, rows.length, dtype=torch.bool, device=device)
        if rows.mask is not None:
            prompt = rows.mask.to(device).expand_as(prompt)
        if self.prompt_length is not None:
            if rows.length < self.prompt_length:
                raise ValueError(
                    f"sequence granularity needs the whole prompt of {self.prompt_length} tokens in one pass, got "
                    f"{rows.length} (chunked prefill, or a cache that was filled before); {advice}"
                )
            return prompt & (torch.arange(rows.length, device=device) < self.prompt_length)
        if self.labels is not None:
            before = (self.labels != -100).to(device).cumsum(1) == 0
            without = (prompt.any(1) & ~(prompt & before).any(1)).nonzero().flatten().tolist()
            if without:
                raise ValueError(
                    f"rows {without} have no prompt before their first label, so nothing may decide their routing: "
                    f"completion tokens never do. Mask the prompt in the labels with -100; {advice}"
                )
            return prompt & before
        return prompt

    def check_foldable(self, batch: int | None, granularity: Granularity) -> None:
        """Raise `ValueError` where routing changes from token to token or from row to row."""
        rows = batch
        if self.weights is not None:
            rows = self.weights.shape[0]
        elif self.experts is not None:
            rows = 1 if isinstance(self.experts, str) else len(set(self.experts))
        elif not granularity.per_sequence:
            raise ValueError(
                "fold=True needs routing that stays the same for the whole sequence; routing per token changes. Force "
                'an expert (experts="…"), give routing_weights, or use granularity="sequence".'
            )
        if rows != 1 or (isinstance(self.experts, list) and None in self.experts):
            raise ValueError(
                f"fold=True serves one mixture at a time, but the {batch} rows have one each: pass one row, or force "
                "the same expert or weights [E] for all."
            )


def columns_of(
    experts: str | Sequence[str | None] | None, names: Sequence[str], batch: int
) -> tuple[int | None, ...] | None:
    """Per row the forced expert's column, -1 for the base, None for a routed row; None if all rows are routed."""
    if experts is None:
        return None
    entries = [experts] * batch if isinstance(experts, str) else list(experts)
    if batch % len(entries):
        raise ValueError(f"experts has {len(entries)} entries for a batch of {batch} rows; give one name per row.")
    repeat = batch // len(entries)  # beams
    place = {None: None, BASE: -1, **{name: i for i, name in enumerate(names)}}
    columns = tuple(place[name] for name in entries for _ in range(repeat))
    return None if all(c is None for c in columns) else columns
