"""Invariant 4: decoding with a cache equals the full forward at every router layer and granularity.

In float64 throughout, so that the policies cannot flip: norms, routers and the logits that `generate` returns.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from dylora_moe import DyLoraMoE
from rounding import EXACT
from tiny import (
    NAMES,
    PLACEMENTS,
    difference,
    every_architecture,
    every_combination,
    every_granularity,
    every_placement,
    left_padded,
    positions,
    tiny_base,
    tiny_mixture,
    tokens,
)

pytestmark = pytest.mark.usefixtures("exact")

NEW = 7


@functools.cache  # no call may change a mixture
def mixture(architecture: str, placement: str, granularity: str = "token", **changes: Any) -> DyLoraMoE:
    settings = {"dtype": torch.float64, **PLACEMENTS[placement], "granularity": granularity, **changes}
    return tiny_mixture(architecture, **settings)


def generate(model: DyLoraMoE, ids: Tensor, **options: Any) -> Any:
    """Sequences, the logits of every new token, and the cache; greedy unless told otherwise."""
    torch.manual_seed(4)
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)


def full_forward(model: DyLoraMoE, sequences: Tensor, prompt: int, **options: Any) -> Any:
    """One pass over whole sequences without a cache; the labels tell sequence granularity where the prompt ends."""
    labels = sequences.clone()
    labels[:, :prompt] = -100
    return model(sequences, labels=labels, use_cache=False, **options)


def assert_same_as_full_forward(model: DyLoraMoE, out: Any, prompt: int, **options: Any) -> None:
    expected = full_forward(model, out.sequences, prompt, **options).logits[:, prompt - 1 : -1]
    assert difference(torch.stack(out.logits, dim=1), expected) <= EXACT


@every_granularity
@every_combination
def test_greedy(architecture, placement, granularity):
    model = mixture(architecture, placement, granularity)
    ids = tokens(2, 6)
    with model.trace() as trace:
        out = generate(model, ids)
    assert_same_as_full_forward(model, out, 6)
    routed = full_forward(model, out.sequences, 6).routing_weights[:, :-1]
    assert difference(trace.weights, routed) <= EXACT
    uncached = generate(model, ids, use_cache=False)
    assert torch.equal(uncached.sequences, out.sequences)
    assert difference(torch.stack(uncached.logits), torch.stack(out.logits)) <= EXACT


@every_granularity
@every_placement
def test_sampling_with_a_seed(placement, granularity):
    model = mixture("llama", placement, granularity)
    options = {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2}
    out, uncached = generate(model, tokens(2, 6), **options), generate(model, tokens(2, 6), use_cache=False, **options)
    assert torch.equal(out.sequences, uncached.sequences)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 4
    assert_same_as_full_forward(model, out, 6)


@every_granularity
@every_placement
def test_beams(placement, granularity):
    model = mixture("gpt2", placement, granularity)
    ids = tokens(2, 6)
    out = generate(model, ids, num_beams=3, num_return_sequences=2, output_scores=True)
    logits = full_forward(model, out.sequences, 6).logits[:, 5:-1].log_softmax(-1)
    chosen = logits.gather(-1, out.sequences[:, 6:, None]).sum((1, 2))
    assert difference(out.sequences_scores, chosen / NEW) <= EXACT
    uncached = generate(model, ids, num_beams=3, num_return_sequences=2, use_cache=False)
    assert torch.equal(out.sequences, uncached.sequences)


@every_granularity
@every_combination
def test_left_padded_batch(architecture, placement, granularity):
    model = mixture(architecture, placement, granularity)
    rows = [tokens(1, 8, seed=1)[0], tokens(1, 5, seed=2)[0], tokens(1, 3, seed=3)[0]]
    ids, mask = left_padded(rows)
    out = generate(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = generate(model, row[None])
        assert torch.equal(out.sequences[i, 8:], alone.sequences[0, len(row) :])
        assert difference(torch.stack(out.logits)[:, i], torch.stack(alone.logits)[:, 0]) <= EXACT


class Collected(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@every_placement
def test_streamer(placement):
    model, streamer = mixture("qwen2", placement), Collected()
    out = generate(model, tokens(1, 6), streamer=streamer)
    assert streamer.ids == out.sequences[0].tolist()
    assert streamer.ended


@every_combination
def test_cache_continued_in_pieces(architecture, placement):
    model, ids = mixture(architecture, placement), tokens(2, 13)
    expected = model(ids, use_cache=False)
    cache, logits, weights = None, [], []
    for piece in ids.split([5, 1, 4, 1, 2], dim=1):
        seen = sum(part.shape[1] for part in logits)
        mask = torch.ones(2, seen + piece.shape[1], dtype=torch.long)
        out = model(piece, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        weights.append(out.routing_weights)
    assert difference(torch.cat(weights, 1), expected.routing_weights) <= EXACT
    assert difference(torch.cat(logits, 1), expected.logits) <= EXACT


@every_placement
def test_a_second_turn_on_the_cache_of_the_first(placement):
    model = mixture("llama", placement)
    first = generate(model, tokens(1, 6))
    whole = torch.cat([first.sequences, tokens(1, 3, seed=9)], dim=1)
    second = generate(model, whole, past_key_values=first.past_key_values)
    assert torch.equal(second.sequences, generate(model, whole).sequences)
    assert_same_as_full_forward(model, second, whole.shape[1])


@every_granularity
@every_placement
def test_static_cache(placement, granularity):
    model = mixture("gemma2", placement, granularity)
    out = generate(model, tokens(2, 6), cache_implementation="static", disable_compile=True)
    assert torch.equal(out.sequences, generate(model, tokens(2, 6)).sequences)
    assert_same_as_full_forward(model, out, 6)


@every_granularity
@every_placement
def test_inputs_embeds(placement, granularity):
    model, ids = mixture("llama", placement, granularity), tokens(2, 6)
    embeds = model.get_input_embeddings()(ids)
    out = generate(model, ids, inputs_embeds=embeds)
    expected = generate(model, ids)
    assert difference(torch.stack(out.logits), torch.stack(expected.logits)) <= EXACT


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"experts": ["red", None]}], ids=str)
def test_experts_on_embeddings_and_head(options):
    model = tiny_mixture("llama", torch.float64, target_modules=["embed_tokens", "q_proj", "lm_head"], router_layer=2)
    assert model.passes_per_step > 1
    ids = tokens(2, 6)
    out, uncached = generate(model, ids, **options), generate(model, ids, use_cache=False, **options)
    assert torch.equal(out.sequences, uncached.sequences)
    if "num_beams" not in options:
        assert_same_as_full_forward(model, out, 6, **options)


@every_granularity
@every_placement
def test_one_expert_per_row(placement, granularity):
    model, ids = mixture("llama", placement, granularity), tokens(4, 6)
    experts = ["red", None, "base", "blue"]
    for options in ({}, {"num_beams": 2}):
        out = generate(model, ids, experts=experts, **options)
        if not options:
            assert_same_as_full_forward(model, out, 6, experts=experts)
        base = tiny_base("llama", torch.float64)
        alone = {
            0: generate(model, ids[:1], experts="red", **options),
            1: generate(model, ids[1:2], **options),
            2: generate(base, ids[2:3], **options),
            3: generate(model, ids[3:], experts="blue", **options),
        }
        for row, expected in alone.items():
            assert torch.equal(out.sequences[row], expected.sequences[0])


@every_granularity
@every_placement
def test_all_rows_forced_to_different_experts(placement, granularity):
    model, ids = mixture("gpt2", placement, granularity), tokens(3, 6)
    out = generate(model, ids, experts=["blue", "red", "blue"])
    assert_same_as_full_forward(model, out, 6, experts=["blue", "red", "blue"])


@every_architecture
def test_given_weights(architecture):
    model, ids = mixture(architecture, "middle"), tokens(2, 6)
    for weights in (torch.tensor([0.2, 0.5, -0.4]), torch.randn(2, 3)):
        out = generate(model, ids, routing_weights=weights)
        assert_same_as_full_forward(model, out, 6, routing_weights=weights)
        beams = generate(model, ids, routing_weights=weights, num_beams=3)
        for row in range(2):
            own = weights if weights.dim() == 1 else weights[row]
            expected = generate(model, ids[row : row + 1], routing_weights=own, num_beams=3)
            assert torch.equal(beams.sequences[row], expected.sequences[0])


def test_given_weights_in_training_positions_with_padding():
    model = mixture("llama", "middle")
    ids, mask = left_padded([tokens(1, 8)[0], tokens(1, 5)[0]])
    weights = torch.randn(2, len(NAMES))
    out = generate(model, ids, attention_mask=mask, routing_weights=weights)
    options = {"attention_mask": torch.nn.functional.pad(mask, (0, NEW), value=1), "routing_weights": weights}
    options["position_ids"] = positions(options["attention_mask"])
    assert_same_as_full_forward(model, out, 8, **options)


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_a_base_route(granularity):
    model = mixture("llama", "middle", granularity, route_to_base=True)
    out = generate(model, tokens(2, 6))
    assert_same_as_full_forward(model, out, 6)
