"""The layer that keeps running totals: what a cache does to its rows and positions it does to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from dylora_moe.base.placement import Placement
from dylora_moe.passes.cache import RunningScores, keeps_no_cache, main_cache, tokens_in
from families import family_base

TOTALS = torch.arange(24.0).reshape(2, 4, 3)


def filled(static: bool = False) -> RunningScores:
    layer = RunningScores(static)
    layer.append(TOTALS[:, :3])
    layer.append(TOTALS[:, 3:])
    return layer


@pytest.mark.parametrize("static", [False, True])
def test_what_is_appended_is_the_last(static):
    layer = filled(static)
    assert int(layer.length) == 4
    assert torch.equal(layer.last, TOTALS[:, 3:])
    assert layer.totals.shape[1] == (1 if static else 4)
    layer.reset()
    assert int(layer.length) == 0
    assert layer.last is None or not layer.last.any()
    layer.append(TOTALS[:, :2])
    assert int(layer.length) == 2
    assert torch.equal(layer.last, TOTALS[:, 1:2])


def test_a_static_one_stays_where_it_is_in_memory():
    layer = filled(static=True)
    where = layer.totals.data_ptr(), layer.length.data_ptr()
    layer.append(TOTALS[:, :1])
    layer.reset()
    assert (layer.totals.data_ptr(), layer.length.data_ptr()) == where


@pytest.mark.parametrize("static", [False, True])
def test_rows_are_reordered_repeated_and_selected(static):
    rows = {
        "reorder_cache": (torch.tensor([1, 1]), [1, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1]),
        "batch_select_indices": (torch.tensor([1]), [1]),
    }
    for method, (argument, expected) in rows.items():
        layer = filled(static)
        before = copy.deepcopy(layer)
        getattr(layer, method)(argument)
        assert torch.equal(layer.last, TOTALS[expected, 3:])
        assert torch.equal(before.last, TOTALS[:, 3:])
        getattr(RunningScores(static), method)(argument)  # an empty one has nothing to change


def test_positions_are_cropped():
    layer = filled()
    layer.crop(0)
    layer.crop(-1)
    assert layer.length == 3
    assert torch.equal(layer.last, TOTALS[:, 2:3])
    layer.crop(-3)
    assert layer.length == 0
    assert layer.last is None
    layer.crop(-1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_transformers_looks_past_it(kind):
    base: Any = family_base("gemma2")
    ids = torch.randint(3, 60, (2, 7))
    options: dict[str, Any] = {"config": base.config, **({"max_cache_len": 9} if kind == "static" else {})}
    cache = {"dynamic": DynamicCache, "static": StaticCache}[kind](**options)
    said = cache.is_compileable, cache.is_croppable, cache.get_max_length()
    cache.layers.append(RunningScores(static=kind == "static"))
    with torch.no_grad():
        base(ids, past_key_values=cache)
    assert said == (cache.is_compileable, cache.is_croppable, cache.get_max_length())
    assert int(tokens_in(cache)) == 7
    assert cache.layers[-1].last is None


@pytest.mark.parametrize(("family", "expected"), [("llama", False), ("mamba", False), ("rwkv", True)])
def test_who_keeps_no_cache(family, expected):
    base = family_base(family)
    assert keeps_no_cache(base, Placement.of(base)) is expected


def test_a_cache_is_made_where_the_decoder_would():
    base: Any = family_base("llama")
    decoder, name = base.get_decoder(), "past_key_values"
    kwargs: dict[str, Any] = {}
    made = main_cache(decoder, name, kwargs, 4, training=False)
    assert kwargs == {name: made}
    assert len(made.layers) == 4
    assert main_cache(decoder, name, {"use_cache": False}, 4, training=False) is None
    assert main_cache(decoder, name, {}, 4, training=False, make=False) is None
    given = DynamicCache()
    assert main_cache(decoder, name, {name: given, "use_cache": False}, 4, training=False) is given
    assert len(given.layers) == 4
    with pytest.raises(ValueError, match="past_key_values of type tuple: pass a transformers Cache"):
        main_cache(decoder, name, {name: ((),)}, 4, training=False)
    decoder.gradient_checkpointing = True
    assert main_cache(decoder, name, {name: given}, 4, training=True) is None
