"""What a call asks for: forced rows, real tokens, the prompt, and what can be folded."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.routing.call import Call, columns_of
from dylora_moe.routing.decision import Rows
from dylora_moe.routing.granularity import GRANULARITIES

NAMES = ["a", "b"]


@pytest.mark.parametrize(
    ("experts", "batch", "columns"),
    [
        (None, 2, None),
        ("b", 2, (1, 1)),
        ("base", 2, (-1, -1)),
        (["a", None, "base"], 3, (0, None, -1)),
        ([None, None], 2, None),
        (["a", "b"], 4, (0, 0, 1, 1)),  # two beams each
    ],
)
def test_the_column_of_every_row(experts, batch, columns):
    assert columns_of(experts, NAMES, batch) == columns


def test_a_name_per_row():
    with pytest.raises(ValueError, match="3 entries for a batch of 4 rows"):
        columns_of(["a", "b", "a"], NAMES, 4)


def test_real_tokens_come_from_the_decoders_mask_or_the_callers():
    own, given = torch.tensor([[0, 1, 1]]), torch.tensor([[1, 1, 0]])
    call = Call(attention_mask=given)
    assert torch.equal(call.rows(1, 3, own, NAMES).mask, own.bool())
    assert torch.equal(call.rows(1, 3, torch.zeros(1, 1, 3, 3), NAMES).mask, given.bool())  # a static cache's
    assert torch.equal(call.rows(1, 1, None, NAMES).mask, given[:, -1:].bool())  # a cached step
    two = Call(attention_mask=torch.tensor([[1, 1], [0, 1]]))
    assert two.rows(4, 2, None, NAMES).mask.tolist() == [[True, True]] * 2 + [[False, True]] * 2  # beams
    assert Call().rows(1, 3, None, NAMES).mask is None


@pytest.mark.parametrize("seen", [2, torch.tensor(2)])
def test_what_comes_after_the_callers_mask_is_real(seen):
    call, static = Call(attention_mask=torch.tensor([[0, 1, 0, 1]])), torch.zeros(1, 1, 3, 8)
    assert call.rows(1, 3, static, NAMES, seen).mask.tolist() == [[False, True, True]]
    assert call.rows(1, 1, static, NAMES, seen + 4).mask.tolist() == [[True]]
    own = torch.tensor([[1, 1, 0]])  # the decoder's, of all positions, says it itself
    assert call.rows(1, 3, own, NAMES, seen).mask.tolist() == [[True, True, False]]
    assert Call().rows(1, 3, None, NAMES, seen).mask is None


def test_the_prompt_ends_at_the_first_label_or_with_its_length():
    rows, device = Rows(2, 4, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()), torch.device("cpu")
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, 8, 9]])
    assert Call(labels=labels).prompt_tokens(rows, device).tolist() == [
        [False, True, False, False],
        [True] + [False] * 3,
    ]
    assert Call(prompt_length=3).prompt_tokens(rows, device).tolist() == [
        [False, True, True, False],
        [True] * 3 + [False],
    ]
    assert torch.equal(Call().prompt_tokens(rows, device), rows.mask)
    with pytest.raises(ValueError, match=r"rows \[0\] have no prompt before their first label"):
        Call(labels=torch.tensor([[1, 2, 3, 4], [-100, 1, 2, 3]])).prompt_tokens(rows, device)
    with pytest.raises(ValueError, match="the whole prompt of 9 tokens in one pass, got 4"):
        Call(prompt_length=9).prompt_tokens(rows, device)


@pytest.mark.parametrize(
    ("call", "batch", "granularity", "message"),
    [
        (Call(), 1, "token", "routing per token changes"),
        (Call(), 1, "prefix", "routing per token changes"),
        (Call(), 2, "sequence", "one mixture at a time"),
        (Call(experts=["a", "b"]), 2, "token", "one mixture at a time"),
        (Call(experts=["a", None]), 2, "token", "one mixture at a time"),
        (Call(weights=torch.ones(2, 1, 2)), 2, "token", "one mixture at a time"),
        (Call(experts="a"), 2, "token", None),
        (Call(experts=["a", "a"]), 2, "token", None),
        (Call(weights=torch.ones(1, 1, 2)), 2, "token", None),
        (Call(), 1, "sequence", None),
    ],
)
def test_what_can_be_folded(call, batch, granularity, message):
    if message is None:
        call.check_foldable(batch, GRANULARITIES[granularity])
    else:
        with pytest.raises(ValueError, match=message):
            call.check_foldable(batch, GRANULARITIES[granularity])
