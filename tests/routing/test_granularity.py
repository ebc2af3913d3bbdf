"""Which tokens' scores decide: each granularity against a loop over rows."""

from __future__ import annotations

import torch

from dylora_moe.routing.granularity import GRANULARITIES, Deciding


def test_every_token_decides_for_itself():
    scores = torch.randn(2, 5, 3)
    assert GRANULARITIES["token"].aggregate(scores, Deciding()).scores is scores
    assert not GRANULARITIES["token"].per_sequence


def test_a_sequence_is_routed_by_the_mean_of_its_prompt():
    scores = torch.randn(3, 5, 2, dtype=torch.float64)
    deciding = Deciding(torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool())
    found = GRANULARITIES["sequence"].aggregate(scores, deciding).scores
    assert found.shape == (3, 1, 2)
    torch.testing.assert_close(found[0, 0], (scores[0, 1] + scores[0, 2]) / 2)
    torch.testing.assert_close(found[1, 0], scores[1].mean(0))
    assert found[2].tolist() == [[0.0, 0.0]]  # a row without a real token has defined scores
    assert GRANULARITIES["sequence"].per_sequence


def test_a_detached_record_keeps_what_decided():
    before = torch.ones(1, 1, 3, requires_grad=True) * 2
    kept = Deciding(before=before).detached()
    assert not kept.before.requires_grad
    assert torch.equal(kept.before, before)
    assert Deciding().detached() == Deciding()
