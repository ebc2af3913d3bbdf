"""Slots hold what joined them, whoever leaves and however often the columns move."""

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from dylora_moe.passes.cache import RunningScores
from dylora_moe.serving.slots import SlotCache, check_served

HEADS, SIZE, WINDOW = 2, 3, 4


def states(length: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, HEADS, length, SIZE)


def read(length: int) -> Cache:
    """An ordinary cache of a full and a sliding layer with `length` tokens of one request, and its running totals."""
    cache = Cache(layers=[DynamicLayer(), DynamicSlidingWindowLayer(WINDOW)])
    for layer in range(2):
        cache.update(states(length), states(length), layer)
    scores = RunningScores(static=False)
    scores.append(torch.randn(1, length, 3))
    cache.layers.append(scores)
    return cache


@pytest.mark.parametrize("slack", [1, 3, 100])
def test_a_batch_sees_what_each_request_would_see_alone(slack, monkeypatch):
    monkeypatch.setattr("dylora_moe.serving.slots.SLACK", slack)
    slots, alone = SlotCache(3, 20), []
    for number in range(12):
        if number in (0, 1, 2, 5, 7):
            alone.append(read(length := (3, 7, 1, 0, 0, 2, 0, 5)[number]))
            slots.join(alone[-1], length)
        if number in (4, 6):
            slots.leave(0)
            alone[0] = alone[-1]
            alone.pop()
        slots.advance()
        assert slots.get_seq_length() + 1 == max(slots.columns.lengths)
        last = slots.layers[-1].last.clone()
        for layer in range(2):
            new = states(1, len(alone)), states(1, len(alone))
            seen = slots.update(*new, layer)
            kept, before = slots.get_mask_sizes(1, layer)
            assert seen[0].shape[2] == kept
            assert kept + before == slots.get_seq_length() + 1
            mask = slots.mask(torch.device("cpu"))[:, before:].bool()
            for row, own in enumerate(alone):
                expected = own.update(*(part[row : row + 1] for part in new), layer)
                for found, part in zip(seen, expected, strict=True):
                    assert torch.equal(found[row][:, mask[row]], part[0])
        totals = torch.randn(len(alone), 1, 3)
        slots.layers[-1].append(totals)
        for row, own in enumerate(alone):
            assert torch.equal(last[row], own.layers[-1].last[0])
            own.layers[-1].append(totals[row : row + 1])
        assert slots.positions(torch.device("cpu")).flatten().tolist() == [n - 1 for n in slots.columns.lengths]


def test_other_caches_are_refused():
    check_served(DynamicCache(config=Gemma2Config(num_hidden_layers=2)), "Kind")
    check_served(Cache(layers=[DynamicLayer(), LinearAttentionLayer()]), "Kind")
    with pytest.raises(ValueError, match="Kind keeps DynamicIndexedLayer in its cache"):
        check_served(Cache(layers=[DynamicLayer(), DynamicIndexedLayer(), LinearAttentionLayer()]), "Kind")
    with pytest.raises(ValueError, match="Kind keeps LinearAttentionLayer in its cache"):
        check_served(Cache(layers=[LinearAttentionLayer(), LinearAttentionLayer()]), "Kind")
