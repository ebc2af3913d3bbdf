"""What a call refuses: the message names the value and the remedy, and the model is as it was."""

import re
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dylora_moe import DyLoraMoE
from tiny import PLACEMENTS, every_placement, tiny_mixture, tokens

NAN, INFINITE = torch.full((3,), float("nan")), torch.tensor([0.5, float("inf"), 0.5])


def refused(run: Any, model: Any, message: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """`run(ids, **options)` raises, and the model then does what it did before."""
    ids = tokens()
    expected = model(ids).logits
    with pytest.raises(error, match=message):
        run(ids, **options)
    assert model.holder.now is model.holder.resting
    assert model.holder.generation is None
    assert torch.equal(model(ids).logits, expected)


WRONG_WEIGHTS = [
    (torch.ones(2), r"shape \[2\]; expected \[3\] or \[batch, 3\]"),
    (torch.ones(4), r"shape \[4\]"),
    (torch.ones(3, 3), r"shape \[3, 3\].* with batch=2"),
    (torch.ones(1, 3), r"shape \[1, 3\].* with batch=2"),
    (torch.ones(2, 9, 2), r"shape \[2, 9, 2\]"),
    (torch.ones(2, 8, 3), r"shape \[2, 8, 3\]"),
    (torch.ones(1, 9, 3), r"shape \[1, 9, 3\]"),
    (torch.ones(2, 9, 3, 1), r"shape \[2, 9, 3, 1\]"),
    (torch.ones(()), r"shape \[\]"),
    (NAN, "not finite"),
    (INFINITE, "not finite"),
]


@pytest.mark.parametrize(("weights", "message"), WRONG_WEIGHTS, ids=str)
def test_wrong_routing_weights(weights, message):
    model = tiny_mixture("llama")
    refused(model, model, message, routing_weights=weights)
    refused(model.generate, model, message, routing_weights=weights, max_new_tokens=2)


@pytest.mark.parametrize(
    "weights", [[0.2, 0.3, 0.5], torch.tensor([1, 0, 0]), torch.tensor([True, False, False]), "red"]
)
def test_weights_that_are_no_float_tensor(weights):
    model = tiny_mixture("llama")
    for run in (model, model.generate):
        refused(run, model, "must be a float tensor of shape", TypeError, routing_weights=weights)


def test_weights_per_position_are_for_forward_only():
    model = tiny_mixture("llama")
    message = r"shape \[2, 9, 3\]; expected \[3\] or \[batch, 3\] with batch=2"
    refused(model.generate, model, message, routing_weights=torch.ones(2, 9, 3))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ("teal", "unknown expert 'teal'; the experts are red, green, blue"),
        (["red", "teal"], "unknown expert 'teal'"),
        (["red"], "experts has 1 entries for a batch of 2 rows"),
        (["red", "red", "red"], "experts has 3 entries for a batch of 2 rows"),
        ([], "experts has 0 entries for a batch of 2 rows"),
    ],
    ids=str,
)
def test_wrong_experts(experts, message):
    model = tiny_mixture("llama")
    for run in (model, model.generate):
        refused(run, model, re.escape(message), experts=experts)


def test_two_ways_to_force_at_once():
    model = tiny_mixture("llama")
    for run in (model, model.generate):
        refused(run, model, "pass one of the two", experts="red", routing_weights=torch.ones(3))
        refused(run, model, r"adapter_names is PEFT's way .* pass experts=", adapter_names=["red", "blue"])


def test_use_experts_takes_one_known_name():
    model = tiny_mixture("llama")
    with pytest.raises(ValueError, match="unknown expert 'teal'"), model.use_experts("teal"):
        pass
    with pytest.raises(TypeError, match="use_experts takes one name"), model.use_experts(["red", "blue"]):
        pass
    assert model.hooks.forced is None


def sequence_mixture(**settings: Any) -> DyLoraMoE:
    return tiny_mixture("llama", granularity="sequence", **settings)


def test_sequence_granularity_needs_a_prompt():
    model, ids = sequence_mixture().train(), tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    refused(model, model, r"rows \[1\] have no prompt before their first label.*granularity=\"token\"", labels=labels)


def test_sequence_granularity_refuses_packed_rows():
    model = sequence_mixture()
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    refused(model, model, r"packed rows .*granularity=\"token\"", position_ids=packed)
    model.moe_config.granularity = "token"
    model(tokens(), position_ids=packed)


@every_placement
def test_sequence_granularity_refuses_pieces(placement):
    model = sequence_mixture(**PLACEMENTS[placement])
    refused(model.generate, model, "needs the whole prompt", prefill_chunk_size=4, max_new_tokens=2)
    out = model(tokens(), use_cache=True)
    with pytest.raises(
        ValueError, match=r"decides on the prompt, .*pass routing_weights=output.routing_weights\[:, -1\]"
    ):
        model(tokens(2, 1), past_key_values=out.past_key_values)
    model(tokens(2, 1), past_key_values=out.past_key_values, routing_weights=out.routing_weights[:, -1])


@pytest.mark.parametrize(
    "options", [{"experts": "red"}, {"experts": "base"}, {"routing_weights": torch.ones(3)}], ids=str
)
@pytest.mark.parametrize("placement", ["below", "last"])
def test_a_cache_that_a_forced_pass_filled(placement, options):
    model = tiny_mixture("llama", **PLACEMENTS[placement])
    cache = DynamicCache(config=model.config)
    model(tokens(), past_key_values=cache, **options)
    refused(model, model, "this cache was filled without the routing pass", past_key_values=cache)
    one = tiny_mixture("llama", **PLACEMENTS["middle"])  # needs no routing pass
    cache = DynamicCache(config=one.config)
    one(tokens(), past_key_values=cache, **options)
    one(tokens(), past_key_values=cache)


def test_a_layer_whose_forward_was_replaced():
    model = tiny_mixture("llama")
    layer = model.routed_layers[0]
    layer.forward = type(layer).forward.__get__(layer)
    with pytest.raises(ValueError, match=f"{layer.routing_name}: something replaced the layer's `forward`"):
        model(tokens())
    del layer.forward
    model(tokens())


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ("hello", TypeError, "input_ids must be a tensor, not 'hello'; tokenizer"),
        ([[1, 2]], TypeError, "input_ids must be a tensor, not"),
        ({"input_ids": tokens()}, TypeError, "not a dict; unpack a batch"),
        (torch.arange(3), ValueError, r"shape \[3\]; expected \[batch, sequence, …\]: pass input_ids\[None\]"),
    ],
    ids=["text", "list", "batch", "row"],
)
def test_inputs_that_are_no_batch_of_ids(ids, error, message):
    model = tiny_mixture("llama")
    for run in (model, model.generate):
        refused(lambda _, run=run: run(ids), model, message, error)


def test_a_pass_without_input_or_with_lists_beside_it():
    model = tiny_mixture("llama")
    refused(lambda _: model(), model, "a pass needs input_ids")
    refused(model, model, "attention_mask must be a tensor", TypeError, attention_mask=[[1] * 9] * 2)
    refused(model, model, "labels must be a tensor", TypeError, labels=[[1] * 9] * 2)


@pytest.mark.parametrize("experts", [5, {"red": 1}], ids=str)
def test_experts_that_are_no_names(experts):
    model = tiny_mixture("llama")
    for run in (model, model.generate):
        refused(run, model, "pass one name for all rows, or a list", TypeError, experts=experts)
