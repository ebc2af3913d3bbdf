"""Invariant 1 for the sparse forms: with top-k weights they equal the loop over experts, outputs and all gradients."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dylora_moe import DyLoraMoE, MoELoraConfig, mixing
from dylora_moe.layers.in_force import Generation
from dylora_moe.mixing.member import side_by_side
from dylora_moe.routing.policies import top_k
from oracle import Loop
from rounding import EXACT, float64_throughout, needs_bfloat16, ulps
from tiny import difference, mix, routed_layer
from tinybase import tiny_base

FORMS = ("grouped", "gathered")
TOLERANCE = EXACT


def compare(
    layer: Any, form: str, x: Tensor, logits: Tensor, active: int, tolerance: float = TOLERANCE, **how: Any
) -> None:
    """Outputs and the gradients of x, of the logits and of every parameter are those of the loop."""
    names = tuple(layer.peft_configs)
    loop = Loop(layer, copy.deepcopy(layer.base_layer), layer.peft_configs)
    loop.names = list(names)
    xs = [x.detach().requires_grad_() for _ in range(2)]
    leaves = [logits.detach().requires_grad_() for _ in range(2)]
    mix(layer, names, top_k(leaves[0], active), active=active, form=form, **how)
    found = layer(xs[0])
    loop.weights = top_k(leaves[1], active).expand(*x.shape[:-1], -1)
    expected = loop(xs[1])
    dy = torch.randn_like(expected)
    for y in (found, expected):
        y.backward(dy)
    assert difference(found, expected) <= tolerance
    assert difference(xs[0].grad, xs[1].grad) <= tolerance
    assert difference(leaves[0].grad, leaves[1].grad) <= tolerance
    parameters = dict(layer.named_parameters())
    for ours, theirs in (("lora_A", "A"), ("lora_B", "B")):
        for name, parameter in getattr(loop, theirs).named_parameters():
            assert difference(parameters[f"{ours}.{name}"].grad, parameter.grad) <= tolerance, name
    with torch.no_grad():
        mix(layer, names, top_k(logits, active), active=active, form=form, **how)
        for layer.holder.generation in (None, Generation()):
            assert difference(layer(x), expected) <= tolerance
            assert difference(layer(x), expected) <= tolerance
    layer.holder.generation = None


def counted(monkeypatch, form: str) -> list[int]:
    """How often the form runs, so that no other one answers in its place."""
    calls, real = [], mixing.FORMS[form]
    monkeypatch.setitem(mixing.FORMS, form, lambda *a, **kwargs: calls.append(1) or real(*a, **kwargs))
    return calls


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    data=st.data(),
    bias=st.booleans(),
    recompute=st.booleans(),
)
def test_random_shapes(form, tokens, sizes, ranks, data, bias, recompute):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    experts = {f"e{i}": {"r": r, "lora_alpha": 1 + 2 * i, "lora_bias": bias} for i, r in enumerate(ranks)}
    layer = routed_layer(nn.Linear(*sizes, bias=bias), experts).double()
    logits = torch.randn(1, tokens, len(ranks), dtype=torch.float64)
    x = torch.randn(1, tokens, sizes[0], dtype=torch.float64)
    compare(layer, form, x, logits, data.draw(st.integers(1, len(ranks) - 1)), recompute_shrink=recompute)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_that_is_asked_for_runs(form, monkeypatch):
    calls = counted(monkeypatch, form)
    experts = {f"e{i}": {"r": 4} for i in range(4)}
    layer = routed_layer(nn.Linear(8, 12), experts).double()
    compare(layer, form, torch.randn(2, 3, 8).double(), torch.randn(2, 3, 4).double(), active=2)
    assert len(calls) == 5


@pytest.mark.parametrize("form", FORMS)
def test_float32_non_contiguous_and_experts_without_a_token(form):
    layer = routed_layer(nn.Linear(16, 12), {f"e{i}": {"r": 4} for i in range(6)})
    x, logits = torch.randn(16, 5, 3).transpose(0, 2), torch.randn(6, 5, 3).transpose(0, 2)
    logits[..., 4:] = -100.0
    compare(layer, form, x, logits, active=2, tolerance=ulps(16))


@pytest.mark.parametrize("form", FORMS)
def test_scalings_of_a_float64_layer_are_not_rounded_to_the_weights_dtype(form):
    experts = {name: {"r": 4, "lora_alpha": alpha} for name, alpha in (("a", 1 / 3), ("b", 0.7), ("c", 0.1))}
    layer = routed_layer(nn.Linear(16, 8), experts).double()
    weights = top_k(torch.randn(1, 5, 3), 2)
    results = {}
    for name in ("reference", form):
        x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(1, 5, 16).requires_grad_()
        mix(layer, experts, weights, active=2, form=name)
        y = layer(x)
        results[name] = [y, *torch.autograd.grad(y.sum(), x)]
        with torch.no_grad():
            results[name].append(layer(x))
    for found, expected in zip(results[form], results["reference"], strict=True):
        assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("sizes", [(1, 8), (8, 1), (1, 1), (4, 1)])
def test_layers_of_width_one_in_float32(sizes):
    layer = routed_layer(nn.Linear(*sizes), {f"e{i}": {"r": 4} for i in range(3)})
    x, logits = torch.randn(1, 5, sizes[0]), torch.randn(1, 5, 3)
    compare(layer, "grouped", x, logits, active=2, tolerance=ulps(128))  # a single output, whose terms may cancel


def test_shared_parameters_stay_where_other_processes_look():
    model = DyLoraMoE.from_base(tiny_base(), MoELoraConfig(num_experts=3, r=4, router_layer=1))
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_one_choice_per_sequence(form):
    layer = routed_layer(nn.Linear(8, 4), {f"e{i}": {"r": 4} for i in range(4)}).double()
    compare(layer, form, torch.randn(3, 5, 8).double(), torch.randn(3, 1, 4).double(), active=1)


@needs_bfloat16
@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    layer = routed_layer(nn.Linear(64, 48), {f"e{i}": {"r": 8} for i in range(4)})
    names, x, logits = tuple(layer.peft_configs), torch.randn(2, 9, 64), torch.randn(2, 9, 4)
    results = {}
    for name in ("reference", form):
        leaf, given_x = logits.clone().requires_grad_(), x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            mix(layer, names, top_k(leaf, 2), active=2, form=name)
            y = layer(given_x)
        y.float().square().mean().backward()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results[name] = [y, leaf.grad, given_x.grad, *grads]
        assert y.dtype == torch.bfloat16
    for found, expected in zip(results[form], results["reference"], strict=True):
        assert difference(found.float(), expected.float()) <= 0.03  # some ulps of bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_dropout_keeps_the_expected_value(form):
    experts = {f"e{i}": {"r": 4, "lora_dropout": 0.5} for i in range(4)}
    layer = routed_layer(nn.Linear(8, 4), experts, train=True)
    x, weights = torch.randn(1, 1, 8), top_k(torch.randn(1, 1, 4), 2)
    mix(layer, experts, weights, active=2, form=form)
    mean = layer(x.expand(1, 20000, 8)).mean(1, keepdim=True)
    assert difference(mean, layer.eval()(x)) < 0.05
    layer.train()
    torch.manual_seed(1)
    first = layer(x.expand(1, 64, 8))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x.expand(1, 64, 8)))


def test_the_matrices_of_a_mixture_lie_side_by_side():
    config = MoELoraConfig(num_experts=4, r=4, init_lora_weights=False, router_layer=1)
    model = DyLoraMoE.from_base(tiny_base(), config)
    layer = model.routed_layers[0]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for change in (lambda: None, lambda: model.double().float(), lambda: model.remove_expert("expert_1")):
        change()
        weights = [layer.lora_B[name].weight for name in model.expert_names]
        with torch.no_grad():
            flat = side_by_side(weights)
        assert flat is not None
        assert torch.equal(flat, torch.cat([w.flatten() for w in weights]))
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if "router" not in n)


@float64_throughout()
def test_the_whole_model_in_every_form():
    config = MoELoraConfig(num_experts=6, r=4, init_lora_weights=False, router_layer=1, top_k=2)
    model = DyLoraMoE.from_base(tiny_base(), config).double().eval()
    ids = torch.arange(24).view(2, 12)
    outputs = {}
    for form in ("reference", "dense", *FORMS, "auto"):
        model.moe_config.mixing_form = form
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        outputs[form] = [output.logits, *(p.grad for p in model.parameters() if p.grad is not None)]
        with torch.no_grad():
            outputs[form].append(model.generate(ids, max_new_tokens=5, do_sample=False))
    for form, found in outputs.items():
        for one, other in zip(found, outputs["reference"], strict=True):
            assert difference(one, other) <= TOLERANCE, form


@torch.no_grad()
@pytest.mark.parametrize("form", ["dense", *FORMS])
def test_layers_of_another_leading_shape_share_nothing_of_a_pass(form):
    """In one pass as many tokens, but other ones: the whole row, and the last positions of it with two inputs."""
    layer = routed_layer(nn.Linear(8, 4), {f"e{i}": {"r": 4} for i in range(4)}).double()
    x, weights = torch.randn(1, 4, 8).double(), top_k(torch.randn(1, 4, 4).double(), 2)
    mix(layer, layer.peft_configs, weights, active=2, form=form)
    whole, last = layer(x), layer(x[:, 2:].repeat(2, 1, 1))
    assert difference(last, whole[:, 2:].repeat(2, 1, 1)) <= TOLERANCE
