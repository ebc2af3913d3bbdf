"""Weights `[B, S or 1, E]` against the leading shapes that layers see."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.mixing.align import align_weights

WEIGHTS = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
CASES = {
    "the same": (WEIGHTS, (2, 3), WEIGHTS),
    "flattened tokens": (WEIGHTS, (6,), WEIGHTS.flatten(0, 1)),
    "flattened, one decision a row": (WEIGHTS[:, :1], (6,), WEIGHTS[:, :1].expand(2, 3, 4).flatten(0, 1)),
    "the last positions": (WEIGHTS, (2, 2), WEIGHTS[:, 1:]),
    "one decision a row": (WEIGHTS[:, :1], (2, 5), WEIGHTS[:, :1].expand(2, 5, 4)),
    "beams": (WEIGHTS, (4, 3), WEIGHTS.repeat_interleave(2, dim=0)),
    "one row for all": (WEIGHTS[:1], (5, 3), WEIGHTS[:1].expand(5, 3, 4)),
    "a batch of one for all rows": (WEIGHTS, (1, 3), WEIGHTS),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_fit_the_layer(case):
    weights, leading, expected = CASES[case]
    found = align_weights(weights, torch.Size(leading))
    shape = torch.broadcast_shapes(found.shape, expected.shape)
    assert torch.equal(found.expand(shape), expected.expand(shape))


@pytest.mark.parametrize("leading", [(3, 3), (2, 4), (5,), (2, 3, 1)], ids=str)
def test_a_layer_that_sees_other_tokens_is_refused(leading):
    with pytest.raises(ValueError, match="leave them out of target_modules"):
        align_weights(WEIGHTS, torch.Size(leading))
