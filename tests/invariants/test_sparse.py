"""Invariant 1 for the sparse forms: with top-k weights they equal the loop over experts, outputs and all gradients."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dylora_moe import DyLoraMoE, MoELoraConfig, routing
from dylora_moe.benchmark.counts import FLOP_FORMULAS
from dylora_moe.mixing import choose, dense_mixture, gathered_mixture, grouped_mixture, sparse
from dylora_moe.mixing.member import LayerExperts, Member, side_by_side
from oracle import Loop
from rounding import EXACT, float64_throughout, needs_bfloat16, ulps
from tiny import difference, routed_layer
from tinybase import tiny_base

FORMS = ("grouped", "gathered")
TOLERANCE = EXACT


def compare(layer: Any, form: str, x: Tensor, logits: Tensor, active: int, tolerance: float = TOLERANCE) -> None:
    """Outputs and the gradients of x, of the logits and of every parameter are those of the loop."""
    names = tuple(layer.peft_configs)
    loop = Loop(layer, copy.deepcopy(layer.base_layer), layer.peft_configs)
    loop.names = list(names)
    xs = [x.detach().requires_grad_() for _ in range(2)]
    leaves = [logits.detach().requires_grad_() for _ in range(2)]
    layer.routing.form = form
    layer.routing.mix(names, routing.top_k(leaves[0], active), active=active)
    found = layer(xs[0])
    loop.weights = routing.top_k(leaves[1], active).expand(*x.shape[:-1], -1)
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
        layer.routing.mix(names, routing.top_k(logits, active), active=active)
        for layer.routing.packed in (None, {}):
            assert difference(layer(x), expected) <= tolerance
            assert difference(layer(x), expected) <= tolerance
    layer.routing.packed = None


def counted(monkeypatch, form: str) -> list[int]:
    """How often the form runs, so that no other one answers in its place."""
    calls, module = [], __import__("dylora_moe.layers", fromlist=["layers"])
    real = getattr(module, f"{form}_mixture")
    monkeypatch.setattr(module, f"{form}_mixture", lambda *a: calls.append(1) or real(*a))
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
    layer.routing.recompute_shrink = recompute
    logits = torch.randn(1, tokens, len(ranks), dtype=torch.float64)
    x = torch.randn(1, tokens, sizes[0], dtype=torch.float64)
    compare(layer, form, x, logits, data.draw(st.integers(1, len(ranks) - 1)))


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
    weights = routing.top_k(torch.randn(1, 5, 3), 2)
    results = {}
    for layer.routing.form in ("reference", form):
        x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(1, 5, 16).requires_grad_()
        layer.routing.mix(tuple(experts), weights, active=2)
        y = layer(x)
        results[layer.routing.form] = [y, *torch.autograd.grad(y.sum(), x)]
        with torch.no_grad():
            results[layer.routing.form].append(layer(x))
    for found, expected in zip(results[form], results["reference"], strict=True):
        assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("sizes", [(1, 8), (8, 1), (1, 1), (4, 1)])
def test_layers_of_width_one_in_float32(sizes):
    layer = routed_layer(nn.Linear(*sizes), {f"e{i}": {"r": 4} for i in range(3)})
    x, logits = torch.randn(1, 5, sizes[0]), torch.randn(1, 5, 3)
    compare(layer, "grouped", x, logits, active=2, tolerance=ulps(128))  # a single output, whose terms may cancel


@torch.no_grad()
def test_sparse_checks_and_another_default_device_do_no_harm():
    x, member = members()
    weights = routing.top_k(torch.randn(len(x), 8), 2)
    expected = dense_mixture(x, weights, [member])[0]
    sparse._silence_sparse_layouts.cache_clear()
    torch.sparse.check_sparse_tensor_invariants.enable()
    torch.set_default_device("meta")  # as a user with a GPU sets it, with this model on the CPU
    try:
        found = gathered_mixture(x, weights, [member], 2)[0]
    finally:
        torch.set_default_device(None)
        torch.sparse.check_sparse_tensor_invariants.disable()
    assert difference(found, expected) <= ulps(64)


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
        layer.routing.form = name
        leaf, given_x = logits.clone().requires_grad_(), x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            layer.routing.mix(names, routing.top_k(leaf, 2), active=2)
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
    layer.routing.form = form
    x, weights = torch.randn(1, 1, 8), routing.top_k(torch.randn(1, 1, 4), 2)
    layer.routing.mix(tuple(experts), weights, active=2)
    mean = layer(x.expand(1, 20000, 8)).mean(1, keepdim=True)
    assert difference(mean, layer.eval()(x)) < 0.05
    layer.train()
    torch.manual_seed(1)
    first = layer(x.expand(1, 64, 8))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x.expand(1, 64, 8)))


def members(experts: int = 8, rank: int = 16, width: int = 64) -> tuple[Tensor, Member]:
    A, B = torch.randn(experts, rank, width), torch.randn(experts, width, rank)
    own = LayerExperts(tuple(range(experts)), (rank,) * experts, (2.0,) * experts)
    return torch.randn(experts, width), Member(own, torch.randn(width, width), None, list(A), list(B))


@torch.no_grad()
def test_matrices_side_by_side_are_not_copied():
    _, member = members()
    for tensors, shape in ((member.lora_A, (16, 64)), (member.lora_B, (64, 16))):
        view = sparse.stacked(tensors, *shape, torch.float32)
        assert view.data_ptr() == tensors[0].data_ptr()
        assert torch.equal(view, torch.stack(list(tensors)))
        shuffled = [tensors[1], tensors[0], *tensors[2:]]
        assert torch.equal(sparse.stacked(shuffled, *shape, torch.float32), torch.stack(shuffled))


@pytest.mark.parametrize(("form", "mixture"), [("grouped", grouped_mixture), ("gathered", gathered_mixture)])
def test_experts_outside_the_best_cost_no_flops(form, mixture):
    x, member = members()
    counts = {}
    for experts in (4, 8):
        own = member.experts
        some = member._replace(
            experts=LayerExperts(own.columns[:experts], own.ranks[:experts], own.scalings[:experts]),
            lora_A=member.lora_A[:experts],
            lora_B=member.lora_B[:experts],
        )
        weights = routing.top_k(torch.randn(len(x), experts), 2)
        counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
        with torch.no_grad(), counter:
            mixture(x, weights, [some], 2)
        counts[experts] = counter.get_total_flops()
    floor = 2 * len(x) * (64 * 64 + 2 * 2 * 16 * 64)
    assert counts[4] == counts[8] == floor


def test_the_choice_follows_from_shapes():
    _, member = members(experts=64)
    x = torch.randn(512, 64)
    assert choose("auto", x, [member], 64, None) == "dense"
    assert choose("auto", x, [member], 64, 64) == "dense"
    assert choose("auto", x[:1], [member], 64, 2) == "gathered"
    assert choose("auto", x, [member], 64, 2) == "grouped"
    with torch.no_grad():  # where the gathered form copies nothing
        assert choose("auto", x, [member], 64, 2) == "gathered"
        assert choose("auto", x, [member], 64, 64 // 2) == "dense"
        assert choose("auto", x.bfloat16(), [member], 64, 2) == "grouped"
    some = member._replace(experts=member.experts._replace(columns=(*range(63), 70)))
    assert choose("grouped", x, [some], 64, 2) == "dense"  # an expert that the layer lacks


@torch.no_grad()
def test_without_gradients_no_matrix_is_copied_per_token():
    """No matrix of `[T·K, R, D]` or `[T·K, O, R]`: nothing larger than the experts' own matrices is allocated."""
    x, member = members(experts=8, rank=16, width=64)
    x = x.repeat(64, 1)
    weights = routing.top_k(torch.randn(len(x), 8), 2)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided)
            return out

    with Sizes():
        found = gathered_mixture(x, weights, [member], 2)
    assert max(sizes) <= len(x) * 64  # of x and y; T·K copies would be 32 times that
    assert difference(found[0], dense_mixture(x, weights, [member])[0]) <= ulps(64)


def test_the_matrices_of_a_mixture_lie_side_by_side():
    config = MoELoraConfig(num_experts=4, r=4, init_lora_weights=False, router_layer=1)
    model = DyLoraMoE.from_base(tiny_base(), config)
    layer = model._layers[0]
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
    x, weights = torch.randn(1, 4, 8).double(), routing.top_k(torch.randn(1, 4, 4).double(), 2)
    layer.routing.form = form
    layer.routing.mix(tuple(layer.peft_configs), weights, active=2)
    whole, last = layer(x), layer(x[:, 2:].repeat(2, 1, 1))
    assert difference(last, whole[:, 2:].repeat(2, 1, 1)) <= TOLERANCE
