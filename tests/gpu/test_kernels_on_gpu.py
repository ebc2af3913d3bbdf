"""The Triton kernels on a GPU: against float64 at 8B-layer shapes, compiled, captured, and inside a mixture.

    pytest -m gpu tests/gpu

bf16 rounds to 2^-9 of an element: H is rounded once and the output once, and sums round with their largest terms.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dylora_moe.mixing import kernels
from tiny import assert_same_gradients, difference, gradients, tiny_mixture, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")]


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    monkeypatch.setenv("DYLORA_MOE_KERNELS", "1")


TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
LAYERS = {"q": (4096, 4096), "kv": (4096, 1024), "up": (4096, 14336), "down": (14336, 4096), "odd": (300, 77)}
"""D and O."""


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def check(kernel, definition, tolerance: float, *inputs: Tensor) -> None:
    """Output and all gradients against the definition in float64."""
    found_in = [t.detach().requires_grad_() for t in inputs]
    expected_in = [t.detach().double().requires_grad_() for t in inputs]
    found, expected = kernel(*found_in), definition(*expected_in)
    assert difference(found, expected) <= tolerance
    dy = torch.randn_like(found)
    found, expected = torch.autograd.grad(found, found_in, dy), torch.autograd.grad(expected, expected_in, dy.double())
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) <= 2 * tolerance  # rounded on the way forward and on the way back


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", [1, 7, 200, 2048])
@pytest.mark.parametrize("layer", LAYERS)
def test_dense_kernels_against_float64(layer, T, dtype):
    (D, O), R = LAYERS[layer], 20 if layer == "odd" else 128
    x, A, gates = normal(T, D, dtype=dtype), normal(R, D, dtype=dtype, scale=D**-0.5), torch.rand(T, R, device="cuda")
    y, B, Hw = normal(T, O, dtype=dtype), normal(O, R, dtype=dtype, scale=R**-0.5), normal(T, R, dtype=dtype)
    assert kernels.available(x)
    check(lambda *a: kernels.shrink(*a)[1], lambda x, A, g: x @ A.T * g, TOLERANCE[dtype], x, A, gates.to(dtype))
    check(kernels.expand, lambda y, Hw, B: y + Hw @ B.T, TOLERANCE[dtype], y, Hw, B)
    assert torch.equal(kernels.expand_(y.clone(), Hw, B), kernels.expand(y, Hw, B))


def test_more_elements_than_int32_counts():
    T, O = 2**16, 2**15 + 64
    y, Hw, B = torch.zeros(T, O, dtype=torch.bfloat16, device="cuda"), normal(T, 16), normal(O, 16)
    kernels.expand_(y, Hw, B)
    last = slice(T - 8, T)
    assert difference(y[last], Hw[last].double() @ B.double().T) <= TOLERANCE[torch.bfloat16]


def adapted_layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
    return kernels.expand(F.linear(x, W), kernels.shrink(x, A, gates)[1], B)


def layer_inputs(T: int) -> list[Tensor]:
    D, O, R = 512, 768, 64
    return [normal(T, D), normal(O, D, scale=D**-0.5), normal(R, D, scale=D**-0.5), normal(O, R), normal(T, R)]


def test_compiled_as_one_graph_forward_and_backward():
    compiled = torch.compile(adapted_layer, fullgraph=True)
    for T in (128, 200, 1):
        inputs = [t.requires_grad_() for t in layer_inputs(T)]
        found, expected = compiled(*inputs), adapted_layer(*inputs)
        assert difference(found, expected) <= TOLERANCE[torch.bfloat16]
        dy = torch.randn_like(found)
        for a, b in zip(torch.autograd.grad(found, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
            assert difference(a, b) <= 2 * TOLERANCE[torch.bfloat16]


def test_in_place_form_compiled():
    @torch.compile(fullgraph=True)
    def decode(x: Tensor, W: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
        return kernels.expand_(F.linear(x, W), kernels.shrink(x, A, gates)[1], B)

    inputs = layer_inputs(1)
    with torch.no_grad():
        assert difference(decode(*inputs), adapted_layer(*inputs)) <= TOLERANCE[torch.bfloat16]


def capture(step) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_decoding_step_in_a_cuda_graph_follows_new_inputs():
    x, *_ = inputs = layer_inputs(1)
    y = torch.empty(1, 768, device="cuda").bfloat16()

    @torch.no_grad()
    def step() -> None:
        y.copy_(adapted_layer(*inputs))

    graph = capture(step)
    x.copy_(normal(1, 512))
    graph.replay()
    replayed = y.clone()
    step()
    assert torch.equal(replayed, y)


def test_a_mixture_on_the_gpu_equals_the_reference_loop():
    """Whatever forms and kernels the layers choose on a GPU: float32, forward and backward."""
    ids = tokens(2, 40).cuda()
    results = []
    for form in ("auto", "reference"):
        model = tiny_mixture(r=16, mixing_form=form).cuda().train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss, gradients(model)))
    (loss, found), (expected_loss, expected) = results
    assert difference(loss, expected_loss) <= 1e-5
    assert_same_gradients(found, expected, 1e-4)
