"""`enable_routing`: stock PEFT models that take `routing_weights=`.

The oracle is PEFT itself: with constant weights, the mixture is all adapters active with their scalings multiplied.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from torch import Tensor

from dylora_moe import enable_routing
from dylora_moe.layers.routed import RoutedLayer
from rounding import EXACT, FLOAT32
from stock import assert_same_tensors, logits, lora_layers, stir, stock_model
from tiny import ARCHITECTURES, difference, tiny_base, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
NAMES = ["red", "green", "blue"]
WEIGHTS = torch.tensor([0.5, -0.25, 1.5], dtype=torch.float64)
PER_ROW = torch.tensor([[0.5, -0.25, 1.5], [0.0, 2.0, 0.1]], dtype=torch.float64)


@contextmanager
def scaled(model: PeftModel, weights: Tensor) -> Iterator[PeftModel]:
    """`model` with every adapter's scaling multiplied by its weight."""
    names = model.base_model.active_adapters
    for layer in lora_layers(model):
        layer.before = dict(layer.scaling)
        for name, weight in zip(names, weights.tolist(), strict=True):
            if name in layer.scaling:
                layer.scaling[name] *= weight
    try:
        yield model
    finally:
        for layer in lora_layers(model):
            layer.scaling = layer.before


def weighted(model: PeftModel, weights: Tensor, ids: Tensor) -> Tensor:
    """The oracle for `[E]`, and row by row for `[B, E]`."""
    if weights.dim() == 2:
        return torch.cat([weighted(model, w, row[None]) for w, row in zip(weights, ids, strict=True)])
    with scaled(model, weights):
        return logits(model, ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("weights", [WEIGHTS, PER_ROW], ids=["E", "BE"])
def test_weights_give_the_weighted_sum(architecture, weights):
    expected = weighted(stock_model(architecture), weights, tokens())
    model = enable_routing(stock_model(architecture))
    assert difference(logits(model, tokens(), routing_weights=weights), expected) <= EXACT
    per_token = weights[..., None, :].expand(2, 9, 3)
    assert difference(logits(model, tokens(), routing_weights=per_token), expected) <= EXACT
    assert difference(expected, logits(model, tokens())) > 1e-3


def test_single_precision():
    expected = weighted(stock_model(dtype=torch.float32), WEIGHTS, tokens())
    model = enable_routing(stock_model(dtype=torch.float32))
    # other GEMM shapes than PEFT's, over four layers
    assert difference(logits(model, tokens(), routing_weights=WEIGHTS.float()), expected) <= FLOAT32


def test_weights_of_one_token_touch_no_earlier_one():
    model = enable_routing(stock_model())
    weights = WEIGHTS.repeat(2, 9, 1)
    before = logits(model, tokens(), routing_weights=weights)
    weights[:, 5] = torch.tensor([3.0, 0.0, -1.0])
    after = logits(model, tokens(), routing_weights=weights)
    assert difference(after[:, :5], before[:, :5]) <= EXACT
    assert difference(after[:, 5], before[:, 5]) > 1e-3


def test_one_hot_weights_are_that_adapter_and_zero_weights_the_base():
    stock, model = stock_model(), enable_routing(stock_model())
    for i, name in enumerate(NAMES):
        stock.base_model.set_adapter(name)
        expected = logits(stock, tokens())
        found = logits(model, tokens(), routing_weights=torch.eye(3, dtype=torch.float64)[i])
        assert difference(found, expected) <= EXACT
    expected = logits(tiny_base(dtype=torch.float64), tokens())
    assert difference(logits(model, tokens(), routing_weights=torch.zeros(3, dtype=torch.float64)), expected) <= EXACT


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 9, 3)])
def test_weights_receive_their_gradient(shape):
    """Against central differences, on a base whose norms stay in float64."""
    model = enable_routing(stock_model("gpt2"))
    weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    direction = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(w: Tensor) -> Tensor:
        return model(tokens(), routing_weights=w).logits.square().mean()

    loss(weights).backward()
    assert weights.grad is not None
    with torch.no_grad():
        slope = (loss(weights + 1e-5 * direction) - loss(weights - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((weights.grad * direction).sum(), slope, rtol=1e-7, atol=1e-9)


def test_adapters_receive_the_gradients_of_the_weighted_sum():
    stock, model = stock_model().train(), enable_routing(stock_model()).train()
    with scaled(stock, WEIGHTS):
        stock(tokens()).logits.square().mean().backward()
    model(tokens(), routing_weights=WEIGHTS).logits.square().mean().backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 4 * (4 + 2 + 3)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert difference(gradient, expected[name]) <= 10 * EXACT, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_the_argument_the_model_is_bit_for_bit_what_it_was(architecture):
    stock, model = (stock_model(architecture, torch.float32) for _ in range(2))
    assert enable_routing(model) is model
    assert isinstance(model, PeftModelForCausalLM)
    assert_same_tensors(dict(model.state_dict()), dict(stock.state_dict()))
    logits(model, tokens(), routing_weights=WEIGHTS.float())  # leaves nothing behind
    assert torch.equal(logits(model, tokens()), logits(stock, tokens()))
    generated = [m.generate(input_ids=tokens(), max_new_tokens=4, do_sample=False) for m in (model, stock)]
    assert torch.equal(*generated)
    for m in (model, stock):
        m.train()(tokens(), labels=tokens()).loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, stock)]
    assert_same_tensors(*gradients)
    model.base_model.set_adapter("green")
    stock.base_model.set_adapter("green")
    assert torch.equal(logits(model.eval(), tokens()), logits(stock.eval(), tokens()))
    for m in (model, stock):
        m.base_model.merge_adapter()
    assert torch.equal(logits(model, tokens()), logits(stock, tokens()))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("weights", [WEIGHTS, PER_ROW], ids=["E", "BE"])
def test_generation(weights, beams):
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    stock, model = stock_model(), enable_routing(stock_model())
    expected = []
    for row, ids in enumerate(tokens()):
        with scaled(stock, weights if weights.dim() == 1 else weights[row]):
            expected.append(stock.generate(input_ids=ids[None], **options)[0])
    assert torch.equal(model.generate(input_ids=tokens(), routing_weights=weights, **options), torch.stack(expected))
    assert torch.equal(model.generate(tokens(), routing_weights=weights, **options), torch.stack(expected))
    assert not torch.equal(torch.stack(expected), stock.generate(input_ids=tokens(), **options))
    assert model.holder.generation is None


def test_weights_follow_the_order_of_the_active_adapters():
    model = enable_routing(stock_model())
    expected = logits(model, tokens(), routing_weights=WEIGHTS)
    model.base_model.set_adapter(["blue", "red", "green"])
    assert difference(logits(model, tokens(), routing_weights=WEIGHTS[[2, 0, 1]]), expected) <= EXACT
    model.base_model.set_adapter(["blue", "red"])
    without_green = WEIGHTS * torch.tensor([1.0, 0.0, 1.0])
    found = logits(model, tokens(), routing_weights=WEIGHTS[[2, 0]])
    model.base_model.set_adapter(NAMES)
    assert difference(found, logits(model, tokens(), routing_weights=without_green)) <= EXACT


def test_adapters_added_afterwards_are_routed_as_well():
    late = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    stock, model = stock_model(), enable_routing(stock_model())
    weights = torch.tensor([0.5, 0.0, 0.25, -2.0], dtype=torch.float64)
    for m in (stock, model):
        torch.manual_seed(0)
        m.add_adapter("late", late)
        m.base_model.set_adapter([*NAMES, "late"])
    expected = weighted(stock, weights, tokens())
    assert difference(logits(model, tokens(), routing_weights=weights), expected) <= EXACT
    assert sum(isinstance(module, RoutedLayer) for module in model.modules()) == len(lora_layers(model))


KINDS = {
    "dora": {
        "one": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        "two": LoraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    },
    "embedding": {
        "one": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
        "two": LoraConfig(r=3, target_modules=["embed_tokens"], use_rslora=True),
    },
    "head": {
        "one": LoraConfig(r=2, target_modules=["lm_head", "down_proj"]),
        "two": LoraConfig(r=3, target_modules=["lm_head"]),
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_kinds_without_a_fast_form_are_mixed_too(kind, architecture):
    stock = stock_model(architecture, **KINDS[kind])
    model = enable_routing(stock_model(architecture, **KINDS[kind]))
    for i, name in enumerate(KINDS[kind]):
        stock.base_model.set_adapter(name)
        found = logits(model, tokens(), routing_weights=torch.eye(2, dtype=torch.float64)[i])
        assert difference(found, logits(stock, tokens())) <= EXACT
    stock.base_model.set_adapter(list(KINDS[kind]))
    if kind != "dora":  # DoRA is not linear in its scaling
        weights = torch.tensor([0.3, 1.7], dtype=torch.float64)
        expected = weighted(stock, weights, tokens())
        assert difference(logits(model, tokens(), routing_weights=weights), expected) <= EXACT


@pytest.mark.parametrize("merged", [["green"], ["red", "blue"], NAMES])
def test_merged_adapters_are_mixed_like_any_other(merged):
    two_alike = {name: LoraConfig(r=2, target_modules=["q_proj", "down_proj"]) for name in NAMES}
    expected = weighted(stock_model(**two_alike), WEIGHTS, tokens())
    model = enable_routing(stock_model(**two_alike))
    model.base_model.merge_adapter(merged)
    assert difference(logits(model, tokens(), routing_weights=WEIGHTS), expected) <= 10 * EXACT


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_changes_no_gradient(training):
    """Two forwards before their backwards: each recompute must see the weights of its own forward."""
    found = []
    for checkpointing in (False, True):
        model = enable_routing(stock_model()).train(training)
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        weights = [WEIGHTS.clone().requires_grad_(), PER_ROW.clone().requires_grad_()]
        losses = [model(tokens(), routing_weights=w).logits.square().mean() for w in weights]
        model(tokens())
        sum(losses).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found[-1] |= {f"weights {i}": w.grad for i, w in enumerate(weights)}
    assert len(found[0]) > 30
    assert_same_tensors(found[1], found[0])


def test_reentrant_checkpointing_is_refused():
    model = enable_routing(stock_model()).train()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r'pass gradient_checkpointing_kwargs=\{"use_reentrant": False\}'):
        model(tokens(), routing_weights=WEIGHTS)


@pytest.mark.parametrize("method", ["deepcopy", "pickle", "torch.save"])
def test_copies_route_on_their_own(method):
    model = enable_routing(stock_model())
    expected = logits(model, tokens(), routing_weights=WEIGHTS)
    if method == "deepcopy":
        other = copy.deepcopy(model)
    elif method == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other) is type(model)
    assert other.holder is not model.holder
    assert all(m.holder is other.holder for m in other.modules() if isinstance(m, RoutedLayer))
    assert torch.equal(logits(other, tokens(), routing_weights=WEIGHTS), expected)
    stir(other, seed=1)
    assert torch.equal(logits(model, tokens(), routing_weights=WEIGHTS), expected)


def test_enabling_twice_is_enabling_once():
    model = enable_routing(stock_model())
    holder, kind = model.holder, type(model)
    assert enable_routing(model) is model
    assert (model.holder, type(model)) == (holder, kind)


def test_models_without_a_task_type_take_weights_too():
    experts = {name: LoraConfig(r=2, target_modules=["q_proj"]) for name in ("one", "two")}
    model = enable_routing(stock_model(**experts))
    assert type(model).__mro__[2] is PeftModel
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    expected = weighted(stock_model(**experts), weights, tokens())
    assert difference(logits(model, tokens(), routing_weights=weights), expected) <= EXACT


def test_calls_within_a_generation_leave_its_routing_alone():
    """A forward with other weights, and one without any, from a callback of `generate`."""
    model = enable_routing(stock_model())
    ids = tokens(1, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    bare = model(input_ids=ids).logits

    def act(_: Tensor, scores: Tensor) -> Tensor:
        model(input_ids=ids, routing_weights=WEIGHTS.flip(0))
        assert torch.equal(model(input_ids=ids).logits, bare)
        return scores

    expected = model.generate(input_ids=ids, routing_weights=WEIGHTS, **options)
    found = model.generate(input_ids=ids, routing_weights=WEIGHTS, logits_processor=[act], **options)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert difference(one, other) <= EXACT
