"""The run of the bare base up to layer k: what it hands out, what it keeps, and that the base is whole afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from dylora_moe.base.placement import Placement
from dylora_moe.passes.cache import ExtraLayer, tokens_in
from dylora_moe.passes.first_pass import first_pass
from families import family_base

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def run(base: Any, k: int, keep: bool = True, **kwargs: Any) -> tuple[dict, torch.Tensor]:
    return first_pass(base, Placement.of(base), k, {"input_ids": IDS, **kwargs}, keep, training=False)


@pytest.mark.parametrize("k", [0, 1, 3, 4])
@pytest.mark.parametrize("family", ["llama", "lfm2", "mamba"])
def test_the_state_that_enters_layer_k(family, k):
    base = family_base(family)
    layers, seen = Placement.of(base).layers(base), []
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    with torch.no_grad():
        seen.append(base.get_decoder()(IDS, use_cache=False).last_hidden_state)
    for handle in handles:
        handle.remove()
    _, hidden = run(base, k, use_cache=False)
    assert torch.equal(hidden, seen[k])
    assert len(Placement.of(base).layers(base)) == 4


@pytest.mark.parametrize("family", ["llama", "lfm2", "qwen3_next", "mamba"])
def test_its_cache_lies_at_the_end_of_the_main_one(family):
    base = family_base(family)
    name = str(Placement.of(base).cache_argument)
    kwargs, _ = run(base, 2, use_cache=True)
    cache = kwargs[name]
    assert len(cache.layers) == 6
    assert tokens_in(DynamicCache(config=base.config)) == 0
    recurrent = [isinstance(layer, ExtraLayer) for layer in cache.layers]
    assert not any(recurrent[:4])
    assert any(recurrent) == (family != "llama")  # found by no one who asks the cache for its last recurrent layer


def test_a_cache_filled_without_it_is_refused():
    base = family_base("llama")
    with torch.no_grad():
        cache = base(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="this cache was filled without the routing pass"):
        run(base, 2, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values of type tuple"):
        run(base, 2, past_key_values=((),))


def test_extra_layers_can_be_copied_and_reordered():
    base = family_base("mamba")
    kwargs, _ = run(base, 2, use_cache=True)
    extra = copy.deepcopy(kwargs["cache_params"].layers[-1])
    before = extra.layer.recurrent_states[0].clone()
    extra.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(extra.layer.recurrent_states[0], before.flip(0))


def test_the_layers_are_put_back_after_an_error():
    base = family_base("llama")
    base.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):
        run(base, 2)
    assert len(base.model.layers) == 4
