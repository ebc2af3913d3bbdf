"""Prefix granularity: what the other granularities promise, in short, and what its running mean adds.

In float64 throughout. Every combination of architecture and placement runs with the slow tests of this folder.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from dylora_moe import DyLoraMoE
from dylora_moe.passes.cache import RunningScores
from oracle import Oracle
from rounding import EXACT
from tiny import (
    NAMES,
    PLACEMENTS,
    VOCAB,
    assert_same_gradients,
    difference,
    every_placement,
    gradients,
    left_padded,
    positions,
    tiny_base,
    tiny_mixture,
    tokens,
)

pytestmark = pytest.mark.usefixtures("exact")

NEW = 5
FILLED_WITHOUT = "this cache was filled without the running mean"
sliding_as_well = pytest.mark.parametrize(
    ("architecture", "placement"),
    [("llama", "first"), ("llama", "middle"), ("gemma2", "middle"), ("gemma2", "below"), ("gemma2", "last")],
)


def fresh_mixture(architecture: str, placement: str, **changes: Any) -> DyLoraMoE:
    settings = {**PLACEMENTS[placement], "granularity": "prefix", **changes}
    return tiny_mixture(architecture, torch.float64, **settings)


mixture = functools.cache(fresh_mixture)  # for calls that change nothing


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert difference(torch.stack(found.logits), torch.stack(expected.logits)) <= EXACT


@every_placement
def test_a_training_step_is_that_of_the_definition(placement):
    model = fresh_mixture("llama", placement, balance_coefficient=3.0).train()
    oracle, ids = Oracle(model, tiny_base("llama", torch.float64)), tokens()
    with model.recording() as records:
        out = model(ids, labels=ids)
    weights = oracle.weights(oracle.logits(ids), k=None)
    expected = oracle.run(ids, weights, labels=ids)
    load = weights.flatten(0, 1).mean(0)
    loss = expected.loss + 3.0 * ((load - 1 / len(NAMES)) ** 2).mean()
    assert difference(out.routing_weights, weights) <= EXACT
    assert difference(out.logits, expected.logits) <= EXACT
    assert difference(out.loss, loss) <= EXACT
    assert difference(records[0].score(model.router), out.router_logits.flatten(0, 1)) <= EXACT
    out.loss.backward()
    loss.backward()
    assert_same_gradients(gradients(model), oracle.gradients(), EXACT)


@sliding_as_well
def test_decoding_a_padded_batch_is_the_forward_of_each_row(architecture, placement):
    model = mixture(architecture, placement)
    rows = [tokens(1, 8, seed=1)[0], tokens(1, 3, seed=2)[0]]
    ids, mask = left_padded(rows)
    with model.trace() as trace:
        out = generate(model, ids, attention_mask=mask)
    assert_same(generate(model, ids, attention_mask=mask, use_cache=False), out)
    for row, alone in enumerate(rows):
        whole = model(torch.cat([alone, out.sequences[row, 8:]])[None], use_cache=False)
        own = slice(8 - len(alone), None)
        assert difference(trace.weights[row, own], whole.routing_weights[0, :-1]) <= EXACT
        logits = torch.stack(out.logits)[:, row]
        assert difference(logits, whole.logits[0, len(alone) - 1 : -1]) <= EXACT


@pytest.mark.parametrize("placement", ["middle", "below"])
def test_beams_and_samples(placement):
    model, (ids, mask) = mixture("gpt2", placement), left_padded([tokens(1, 6)[0], tokens(1, 4, seed=2)[0]])
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for cached in (True, False):
            torch.manual_seed(1)
            found.append(generate(model, ids, attention_mask=mask, use_cache=cached, **options).sequences)
        assert torch.equal(*found)


@pytest.mark.parametrize(("architecture", "placement"), [("llama", "middle"), ("gemma2", "last")])
def test_rejected_candidates_leave_no_trace(architecture, placement):
    model, ids = mixture(architecture, placement), tokens(1, 4).repeat(1, 3)
    out = generate(model, ids, prompt_lookup_num_tokens=3)
    assert_same(out, generate(model, ids))
    (layer,) = [layer for layer in out.past_key_values.layers if isinstance(layer, RunningScores)]
    assert layer.length == out.past_key_values.get_seq_length()


@sliding_as_well
def test_a_cache_continued_in_pieces_and_cropped(architecture, placement):
    model, ids = mixture(architecture, placement), tokens(2, 13)
    expected = model(ids, use_cache=False)
    cache, seen = DynamicCache(config=model.config), 0
    cache.activate_past_recording()
    for length, rejected in ((5, 2), (1, 0), (4, 1), (6, 0)):
        upto = slice(seen, seen + length)
        out = model(ids[:, upto], attention_mask=torch.ones(2, seen + length), past_key_values=cache, use_cache=True)
        assert difference(out.routing_weights, expected.routing_weights[:, upto]) <= EXACT
        assert difference(out.logits, expected.logits[:, upto]) <= EXACT
        cache.crop(-rejected)
        seen += length - rejected
    assert seen == 13


@pytest.mark.parametrize("placement", ["middle", "last"])
def test_a_second_turn_and_the_cache_of_one_row_for_several(placement):
    model = mixture("llama", placement)
    first = generate(model, tokens(1, 6))
    whole = torch.cat([first.sequences, tokens(1, 3, seed=9)], dim=1)
    first.past_key_values.batch_repeat_interleave(2)
    second = generate(model, whole.repeat(2, 1), past_key_values=first.past_key_values)
    assert_same(second, generate(model, whole.repeat(2, 1)))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("placement", ["middle", "last"])
def test_a_static_cache(placement, chunk):
    model, (ids, mask) = mixture("gemma2", placement), left_padded([tokens(1, 7)[0], tokens(1, 4, seed=2)[0]])
    options = {"attention_mask": mask, "prefill_chunk_size": chunk}
    static = generate(model, ids, cache_implementation="static", disable_compile=True, **options)
    assert isinstance(static.past_key_values, StaticCache)
    assert_same(static, generate(model, ids, attention_mask=mask))


def test_a_static_cache_that_is_used_again():
    model, ids = mixture("llama", "middle"), tokens(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=16)
    expected = generate(model, ids)
    for _ in range(2):
        assert_same(generate(model, ids, past_key_values=cache), expected)
        cache.reset()


@pytest.mark.parametrize("placement", ["middle", "below"])
def test_rows_that_are_forced_touch_no_other(placement):
    model, ids = mixture("llama", placement), tokens(4, 6)
    out = generate(model, ids, experts=["red", None, "base", None])
    for row, forced in ((0, "red"), (1, None), (2, "base"), (3, None)):
        alone = generate(model, ids[row : row + 1], experts=forced)
        assert torch.equal(out.sequences[row], alone.sequences[0])
        assert difference(torch.stack(out.logits)[:, row], torch.stack(alone.logits)[:, 0]) <= EXACT
    again = generate(model, torch.cat([out.sequences, ids], 1), past_key_values=out.past_key_values)
    routed = generate(model, torch.cat([out.sequences, ids], 1)[1:2])
    assert torch.equal(again.sequences[1], routed.sequences[0])  # the rows were scored all the same


@pytest.mark.parametrize("placement", ["middle", "last"])
def test_routing_depends_on_earlier_tokens_only(placement):
    model, ids = mixture("llama", placement), tokens(2, 9)
    changed = ids.clone()
    changed[:, 4:] = 2 + (ids[:, 4:] + 5) % (VOCAB - 2)
    found, expected = model(changed).routing_weights, model(ids).routing_weights
    assert difference(found[:, :4], expected[:, :4]) <= EXACT
    assert difference(found[:, 4], expected[:, 4]) > 1e-3
    first = ids.clone()
    first[:, 0] = 2 + (ids[:, 0] + 5) % (VOCAB - 2)
    below = model(first).router_logits - model(ids).router_logits
    assert (below[:, -1].abs() > 1e-3).any()  # all of them, from the first


@pytest.mark.parametrize("said", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packed_rows_start_anew(said):
    model = fresh_mixture("llama", "first").train()
    parts = [tokens(1, length, seed=length) for length in (4, 1, 5)]
    ids = torch.cat(parts, 1)
    where = {
        "position_ids": torch.cat([torch.arange(4), torch.arange(1), torch.arange(5)])[None],
        "cu_seq_lens_q": torch.tensor([0, 4, 5, 10], dtype=torch.int32),
        "seq_idx": torch.tensor([[0] * 4 + [1] + [2] * 5], dtype=torch.int32),
    }[said]
    with model.recording() as records:
        packed = model(ids, use_cache=False, **{said: where}).router_logits  # scores of the embeddings
    expected = torch.cat([model(part, use_cache=False).router_logits for part in parts], 1)
    assert difference(packed, expected) <= EXACT
    assert difference(records[0].score(model.router), expected[0]) <= EXACT


def test_packed_rows_train_as_rows_of_their_own():
    model = fresh_mixture("llama", "middle", balance_coefficient=0.0).train()
    parts = [tokens(1, 5, seed=length) for length in (1, 2)]
    model(torch.cat(parts), labels=torch.cat(parts), use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    labels = torch.cat(parts, 1)
    labels[:, 5] = -100  # which the first sequence would predict
    where = torch.arange(5).repeat(2)[None]
    model(torch.cat(parts, 1), labels=labels, position_ids=where, use_cache=False).loss.backward()
    assert_same_gradients(gradients(model), expected, 10 * EXACT)


@pytest.mark.parametrize(
    "options", [{"experts": "red"}, {"experts": "base"}, {"routing_weights": torch.ones(3)}], ids=str
)
@pytest.mark.parametrize("placement", ["middle", "last"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_a_forced_pass_filled_or_went_on_with(placement, kind, options):
    model, ids = mixture("llama", placement), tokens(2, 5)
    kinds = {"dynamic": {}, "static": {"max_cache_len": 16}}
    for routed_first in (False, True):
        cache: Any = {"dynamic": DynamicCache, "static": StaticCache}[kind](config=model.config, **kinds[kind])
        if routed_first:
            model(ids, past_key_values=cache)
        model(ids, past_key_values=cache, **options)
        message = FILLED_WITHOUT if placement == "middle" else "this cache was filled without"
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache, **options)


def test_a_cache_of_another_granularity_or_other_experts():
    model, ids = fresh_mixture("llama", "middle"), tokens(2, 5)
    cache = DynamicCache(config=model.config)
    model.moe_config.granularity = "token"
    model(ids, past_key_values=cache)
    model.moe_config.granularity = "prefix"
    with pytest.raises(ValueError, match=FILLED_WITHOUT):
        model(ids, past_key_values=cache)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    model.remove_expert("blue")
    with pytest.raises(ValueError, match=FILLED_WITHOUT):
        model(ids, past_key_values=cache)


def test_the_trace_of_a_forced_row_counts_its_real_tokens():
    model, (ids, mask) = mixture("llama", "middle"), left_padded([tokens(1, 6)[0], tokens(1, 4, seed=2)[0]])
    options = {"attention_mask": mask, "cache_implementation": "static", "disable_compile": True}
    for forced in ("red", None):
        with model.trace() as trace:
            generate(model, ids, experts=forced, **options)
        assert trace.table()[0]["tokens"] == 6 + 4 + 2 * (NEW - 1)


def test_packed_requests_are_refused():
    model = mixture("llama", "middle")
    with pytest.raises(ValueError, match='has no place; use granularity="token"'):
        model.get_base_model()(tokens(1), cache=object(), use_cache=False)


def test_gradient_checkpointing_keeps_no_cache():
    model = fresh_mixture("llama", "middle").train()
    model.gradient_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    model(tokens(), past_key_values=cache)
    assert not any(isinstance(layer, RunningScores) for layer in cache.layers)


def test_the_positions_of_padding_begin_no_sequence():
    model, (ids, mask) = mixture("llama", "middle"), left_padded([tokens(1, 6)[0], tokens(1, 2, seed=2)[0]])
    expected = model(ids, attention_mask=mask, position_ids=positions(mask)).routing_weights
    other = positions(mask).masked_fill(mask == 0, 1)  # what padding holds does not matter
    assert torch.equal(model(ids, attention_mask=mask, position_ids=other).routing_weights, expected)
