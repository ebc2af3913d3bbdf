"""Invariant 4, assisted generation: candidates that a draft proposes and the mixture rejects leave no trace."""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dylora_moe import DyLoraMoE
from rounding import EXACT
from tiny import (
    PLACEMENTS,
    difference,
    every_combination,
    every_granularity,
    every_placement,
    tiny_base,
    tiny_mixture,
    tokens,
)

pytestmark = pytest.mark.usefixtures("exact")

NEW = 10


def mixture(architecture: str, placement: str, granularity: str = "token") -> DyLoraMoE:
    settings = {**PLACEMENTS[placement], "granularity": granularity}
    return tiny_mixture(architecture, torch.float64, **settings)


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)


def draft_that_errs(model: DyLoraMoE, ids: Tensor) -> DyLoraMoE:
    """A copy of the mixture whose every second token is another one."""
    draft, calls = copy.deepcopy(model), itertools.count()
    head = draft.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda head, args, logits: logits.roll(1, -1) if next(calls) % 2 else logits)
    if model.moe_config.granularity == "sequence":  # a draft starts from a filled cache, where nothing could decide
        weights = model(ids).routing_weights[:, -1].detach()
        draft.generate = functools.partial(draft.generate, routing_weights=weights)
    return draft


def lengths_of_passes(model: DyLoraMoE) -> list[int]:
    """Grows with the number of tokens of every pass through the top decoder layer."""
    lengths: list[int] = []
    top: nn.Module = model.placement.layers(model.get_base_model())[-1]
    top.register_forward_hook(lambda layer, args, output: lengths.append(args[0].shape[1]))
    return lengths


def assert_some_accepted_and_some_rejected(lengths: list[int], prompt: int) -> None:
    steps = [length - prompt * (i == 0) for i, length in enumerate(lengths)]
    assert len(lengths) < NEW, "no candidate was accepted"
    assert sum(steps) > NEW, "no candidate was rejected"


@every_granularity
@every_combination
def test_a_draft_that_gets_rejected(architecture, placement, granularity):
    model, ids = mixture(architecture, placement, granularity), tokens(1, 6)
    draft = draft_that_errs(model, ids)
    expected = generate(model, ids)
    lengths = lengths_of_passes(model)
    out = generate(model, ids, assistant_model=draft)
    assert torch.equal(out.sequences, expected.sequences)
    assert difference(torch.stack(out.logits), torch.stack(expected.logits)) <= EXACT
    if placement != "last":  # whose routing pass runs the top layer, too
        assert_some_accepted_and_some_rejected(lengths, 6)


@every_placement
def test_prompt_lookup(placement):
    model, ids = mixture("llama", placement), tokens(1, 4).repeat(1, 3)
    expected = generate(model, ids)
    lengths = lengths_of_passes(model)
    out = generate(model, ids, prompt_lookup_num_tokens=3)
    assert max(lengths[1:]) > 1, "nothing was proposed"
    assert torch.equal(out.sequences, expected.sequences)
    assert difference(torch.stack(out.logits), torch.stack(expected.logits)) <= EXACT


@every_placement
def test_a_bare_base_as_draft_and_a_forced_expert(placement):
    model, ids = mixture("llama", placement), tokens(1, 6)
    for options in ({"experts": "red"}, {"experts": ["blue"]}, {"routing_weights": torch.tensor([0.5, 0.0, 0.7])}):
        expected = generate(model, ids, **options)
        out = generate(model, ids, assistant_model=tiny_base("llama", torch.float64), **options)
        assert torch.equal(out.sequences, expected.sequences)
        assert difference(torch.stack(out.logits), torch.stack(expected.logits)) <= EXACT


@pytest.mark.parametrize("placement", ["first", "middle", "below", "last"])
@every_granularity
def test_early_exit_is_plain_decoding_or_refused(placement, granularity):
    model, ids = mixture("llama", placement, granularity), tokens(1)
    expected = generate(model, ids)
    for exit_layer in (1, 2, 3):
        if placement in ("below", "last"):
            with pytest.raises(ValueError, match="pass an assistant_model"):
                generate(model, ids, assistant_early_exit=exit_layer)
            forced = generate(model, ids, experts="red", assistant_early_exit=exit_layer)
            assert torch.equal(forced.sequences, generate(model, ids, experts="red").sequences)
            continue
        found = generate(model, ids, assistant_early_exit=exit_layer)
        assert torch.equal(found.sequences, expected.sequences)
