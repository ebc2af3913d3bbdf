"""A record scores again what its pass scored, for the tokens that count."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.routing.granularity import GRANULARITIES, Deciding
from dylora_moe.routing.records import RouterRecord
from dylora_moe.routing.router import Router


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scores_of_the_tokens_that_count(granularity, masked):
    router, hidden = Router(8, 3), torch.randn(2, 4, 8)
    prompt = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool() if masked else None
    kind = GRANULARITIES[granularity]
    record = RouterRecord(hidden, Deciding(prompt if kind.per_sequence else None), mask, kind)
    deciding = {
        "token": lambda b, t: hidden[b, t : t + 1],
        "sequence": lambda b, t: hidden[b, prompt[b]],
        "prefix": lambda b, t: hidden[b, : t + 1],
    }[granularity]
    rows = []
    for b, t in ((b, t) for b in range(2) for t in range(4)):
        if mask is None or mask[b, t]:
            rows.append(router(deciding(b, t)).mean(0))
    torch.testing.assert_close(record.score(router), torch.stack(rows))


def test_the_router_gets_its_gradient_through_a_record():
    router = Router(8, 3)
    RouterRecord(torch.randn(2, 4, 8), Deciding(), None, GRANULARITIES["token"]).score(router).square().sum().backward()
    assert all(parameter.grad.any() for parameter in router.parameters())
