"""Invariant 13: `disable_adapter()` is the base, bit for bit, and leaves everything as it was."""

from typing import Any

import pytest
import torch

from dylora_moe import DyLoraMoE
from tiny import PLACEMENTS, every_architecture, every_combination, gradients, tiny_base, tiny_mixture, tokens


def everything(model: DyLoraMoE) -> dict[str, Any]:
    """What the block must restore."""
    return {
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "active": [layer.active_adapters for layer in model.routed_layers],
        "disabled": [layer.disable_adapters for layer in model.routed_layers],
        "adapter": model.active_adapter,
        "holder": model.holder.now,
        "flag": model._adapters_disabled,
    }


@every_combination
def test_is_the_base_and_restores(architecture, placement):
    model, base = tiny_mixture(architecture, lora_dropout=0.3, **PLACEMENTS[placement]), tiny_base(architecture)
    model.freeze_expert("green")
    model.router.down.requires_grad_(False)
    ids = tokens()
    for train in (True, False):
        model.train(train)
        model.routed_layers[0].train(not train)  # a mode of its own
        before, expected = everything(model), base.train(train)(ids, labels=ids)
        with model.disable_adapter():
            out = model(ids, labels=ids)
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.loss, expected.loss)
            assert out.routing_weights is None
            assert out.router_logits is None
            assert out.aux_loss is None
            assert torch.equal(model.get_base_model()(ids).logits, expected.logits)
        assert everything(model) == before


@every_architecture
def test_generation(architecture):
    model, options = tiny_mixture(architecture, **PLACEMENTS["below"]), {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens(), **options)
    with model.disable_adapter():
        found = model.generate(tokens(), **options)
    assert torch.equal(found, tiny_base(architecture).generate(tokens(), **options))
    assert torch.equal(model.generate(tokens(), **options), expected)
    assert not torch.equal(found, expected)


@every_architecture
def test_training_goes_on_as_before(architecture):
    model = tiny_mixture(architecture).train()

    def step() -> dict[str, torch.Tensor]:
        model(tokens(), labels=tokens()).loss.backward()
        found = gradients(model)
        model.zero_grad()
        return found

    model.freeze_expert("blue")
    expected = step()
    with model.disable_adapter(), torch.no_grad():
        model(tokens())
    found = step()
    assert found.keys() == expected.keys()
    assert not any("blue" in name for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_error_within_and_nesting():
    model = tiny_mixture("llama").train()
    model.freeze_expert("red")
    before = everything(model)
    expected = tiny_base("llama").train()(tokens()).logits
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert everything(model) == before
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, expected)
        assert torch.equal(model(tokens()).logits, expected)
    assert everything(model) == before


def test_forcing_within_is_still_the_base():
    model = tiny_mixture("llama")
    expected = tiny_base("llama")(tokens()).logits
    with model.disable_adapter():
        for options in ({"experts": "red"}, {"experts": ["red", None]}, {"routing_weights": torch.ones(3)}):
            assert torch.equal(model(tokens(), **options).logits, expected)


def test_the_trace_sees_nothing_within():
    model = tiny_mixture("llama")
    with model.trace() as trace:
        with model.disable_adapter():
            model(tokens())
        assert trace.layers_reached == []
        assert trace.passes == []
        model(tokens())
    assert len(trace.passes) == 1
