"""The one training loop of all methods: stock parts, completions only, the same rows in the same order by seed.

Shapes: B rows, S tokens, M tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.examples import Example, encode

IGNORED = -100


@dataclass(frozen=True)
class Padded:
    """Token ids, their attention mask and positions, each `[B, S]`, padded on the left."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def padded(rows: Sequence[Sequence[int]]) -> Padded:
    """Rows of token ids, padded on the left so that they end together."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Padded(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))


def completion_loss(model: Any, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, **force: Any) -> Tensor:
    """Mean cross-entropy in nats per completion token; the head reads the last M + 1 positions only."""
    encoded = [encode(row, tokenizer) for row in rows]
    batch, longest = padded([ids for ids, _ in encoded]), max(len(ids) - prompt for ids, prompt in encoded)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (ids, prompt) in enumerate(encoded):
        labels[i, longest - (len(ids) - prompt) :] = torch.tensor(ids[prompt:])
    logits = model(**vars(batch), logits_to_keep=longest + 1, use_cache=False, **force).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def train(
    loss: Callable[[Sequence[Example]], Tensor],
    parameters: Sequence[nn.Parameter],
    plan: Sequence[Sequence[Example]],
    rate: float,
    first: int = 0,
    total: int | None = None,
    state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """AdamW over the batches of `plan`: a tenth of the steps of warm-up, then linearly to zero.

    Args:
        loss: of a batch.
        parameters: to train.
        plan: the batches.
        rate: at its highest.
        first: how many steps of `total` (default: those of the plan) came before.
        state: of the optimizer after them.

    Returns:
        the optimizer's state.
    """
    total = len(plan) if total is None else total
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    if state is not None:
        optimizer.load_state_dict(state)
    warm_up = max(1, total // 10)
    for step, batch in enumerate(plan, start=first):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm_up, (total - step) / max(total - warm_up + 1, 1))
        loss(batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer.state_dict()
