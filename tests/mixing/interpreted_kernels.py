"""The Triton kernels through Triton's interpreter, on the CPU in float32; `test_kernels.py` runs this file.

Every kernel is compared with its definition, spelled out in float64: outputs and all gradients. The rounding of
float32 sums of up to 700 terms grows with their root: 26 ulps of the largest element, of which five times are allowed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dylora_moe.mixing import kernels
from rounding import FLOAT32, ulps
from tiny import assert_same_gradients, difference, gradients, tiny_mixture, tokens

TOLERANCE = ulps(5 * 26)
RAGGED = [(1, 1, 1, 1), (3, 17, 5, 33), (20, 700, 37, 16), (70, 65, 130, 129), (1, 600, 24, 40), (300, 40, 20, 70)]
"""T, D, ΣR, O: one of each, below and above every tile, split and not."""
EMPTY = [(0, 8, 4, 8), (2, 8, 0, 8), (2, 0, 4, 8), (0, 0, 0, 0)]


def shrink_by_definition(x: Tensor, A: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    H = (x[:, None, :] * A).sum(-1)
    return H, H * gates


def expand_by_definition(y: Tensor, Hw: Tensor, B: Tensor) -> Tensor:
    return y + (Hw[:, None, :] * B).sum(-1)


def check(kernel, loop, *inputs: Tensor) -> None:
    """Outputs and the gradients of every input, from float32, against the definition in float64."""
    single = [t.detach().requires_grad_() for t in inputs]
    double = [t.detach().double().requires_grad_() for t in inputs]
    found, expected = kernel(*single), loop(*double)
    found, expected = (out if isinstance(out, tuple) else (out,) for out in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) <= TOLERANCE
    gradients = [torch.randn_like(out) for out in found]
    found = torch.autograd.grad(found, single, gradients)
    expected = torch.autograd.grad(expected, double, [g.double() for g in gradients], materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) <= TOLERANCE


def test_the_interpreter_makes_them_available_for_float32_only():
    assert kernels.available(torch.zeros(1))
    assert not kernels.available(torch.zeros(1, dtype=torch.float64))
    assert not kernels.available(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", RAGGED + EMPTY, ids=str)
def test_shrink(shape):
    T, D, R, _ = shape
    check(kernels.shrink, shrink_by_definition, torch.randn(T, D), torch.randn(R, D), torch.randn(T, R))


@pytest.mark.parametrize("shape", RAGGED + EMPTY, ids=str)
def test_expand(shape):
    T, _, R, O = shape
    check(kernels.expand, expand_by_definition, torch.randn(T, O), torch.randn(T, R), torch.randn(O, R))


def test_views_of_any_strides():
    T, D, R, O = 19, 40, 12, 23
    x, A, B = torch.randn(D, T).T, torch.randn(R, 2 * D)[:, ::2], torch.randn(R, O).T
    gates = torch.randn(T, 1).expand(T, R)
    check(kernels.shrink, shrink_by_definition, x, A, gates)
    check(kernels.expand, expand_by_definition, torch.randn(O, T).T, torch.randn(T, 3 * R)[:, R : 2 * R], B)


def test_in_place_writes_into_y_and_nothing_else():
    T, R, O = 5, 6, 50
    whole = torch.randn(T, 2 * O)
    before = whole.clone()
    y, Hw, B = whole[:, :O], torch.randn(T, R), torch.randn(O, R)
    assert kernels.expand_(y, Hw, B) is y
    assert difference(y, expand_by_definition(before[:, :O].double(), Hw.double(), B.double())) <= TOLERANCE
    assert torch.equal(whole[:, O:], before[:, O:])


def test_only_the_gradients_asked_for():
    x, A, gates = torch.randn(4, 9, requires_grad=True), torch.randn(3, 9), torch.randn(4, 3, requires_grad=True)
    H, _ = kernels.shrink(x, A, gates)  # Hw unused
    found = torch.autograd.grad(H.sum(), [x, gates], allow_unused=True)
    assert difference(found[0], A.sum(0).expand(4, -1)) <= TOLERANCE
    assert found[1] is None
    y, B = torch.randn(4, 5, requires_grad=True), torch.randn(5, 3)
    (dy,) = torch.autograd.grad(kernels.expand(y, H.detach(), B).sum(), [y])
    assert torch.equal(dy, torch.ones_like(y))


OPERATORS = {
    "shrink": lambda: (torch.randn(3, 9), torch.randn(4, 9), torch.randn(3, 4)),
    "expand": lambda: (torch.randn(3, 7), torch.randn(3, 4), torch.randn(7, 4)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    inputs = tuple(t.requires_grad_() for t in OPERATORS[name]())
    torch.library.opcheck(getattr(torch.ops.dylora_moe, name).default, inputs, atol=1e-5, rtol=1e-5)


def test_opcheck_in_place():
    torch.library.opcheck(torch.ops.dylora_moe.expand_.default, OPERATORS["expand"]())


def test_full_graph_of_a_layer_forward_and_backward():
    """Traced to the ATen level, functional and in-place forms: no break, the same numbers."""

    def layer(x, W, A, B, gates):
        Hw = kernels.shrink(x, A, gates)[1]
        return kernels.expand(torch.nn.functional.linear(x, W), Hw, B)

    def decode(x, W, A, B, gates):
        with torch.no_grad():
            return kernels.expand_(torch.nn.functional.linear(x, W), kernels.shrink(x, A, gates)[1], B)

    W, A, B = torch.randn(11, 9), torch.randn(4, 9), torch.randn(11, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (3, 6, 1):
        inputs = [t.clone().requires_grad_() for t in (torch.randn(T, 9), W, A, B, torch.randn(T, 4))]
        found, expected = compiled(*inputs), layer(*inputs)
        assert difference(found, expected) <= TOLERANCE
        gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
        for a, b in zip(*gradients, strict=True):
            assert difference(a, b) <= TOLERANCE
        assert difference(torch.compile(decode, fullgraph=True, backend="aot_eager")(*inputs), expected) <= TOLERANCE


def test_a_mixture_through_the_kernels(monkeypatch):
    """The layers call them, with and without gradients, and give the plain run's numbers."""
    model, ids = tiny_mixture(mixing_form="dense"), tokens()
    calls = []
    for name in ("shrink", "expand_"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    found = []
    for available in (True, False):
        if not available:
            assert set(calls) == {"shrink", "expand_"}
            monkeypatch.setattr(kernels, "available", lambda x: False)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        with torch.no_grad():
            found.append((output.logits.detach(), model(ids).logits, gradients(model)))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert difference(one, other) <= TOLERANCE
    assert_same_gradients(found[0][2], found[1][2], FLOAT32)
