"""The experts of a linear against the plain loop, cut over ranks and added up again."""

import pytest
import torch
from torch import nn

from dylora_moe_vllm.experts import Experts, Source, add_to, sources_by_linear
from dylora_moe_vllm.geometry import Geometry
from dylora_moe_vllm.in_force import InForce, Patterns
from dylora_moe_vllm.settings import Carried

Q, V = (Carried(0, 4, 2.0), Carried(2, 8, 0.5)), (Carried(1, 2, 1.0),)


def loop(x, weights, A, B, carried):
    """The definition, expert by expert."""
    y, row = torch.zeros(len(x), len(B)), 0
    for column, rank, scaling in carried:
        own = slice(row, row + rank)
        y += weights[:, column, None] * scaling * (x @ A[own].t() @ B[:, own].t())
        row += rank
    return y


def mixture(weights, *linears):
    """Some linears' experts with these weights in force."""
    in_force, patterns = InForce(), Patterns()
    found = [Experts(geometry, sources, in_force, patterns, torch.float32) for geometry, sources in linears]
    in_force.factors = patterns(weights, torch.float32)
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_parts_cut_by_output(size: int):
    x, weights = torch.randn(7, 12), torch.rand(7, 3)
    sources = [Source("q", 0, Q), Source("v", 2, V)]
    matrices = {s.path: (torch.randn(s.rows, 12), torch.randn(8 if s.path == "q" else 4, s.rows)) for s in sources}
    for rank in range(size):
        geometry = Geometry(12, (8, 4, 4), (1, 1, 1), rank, size, "outputs")
        (experts,) = mixture(weights, (geometry, sources))
        for source in sources:
            assert experts.shapes(source) == {
                k: tuple(m.shape) for k, m in zip("AB", matrices[source.path], strict=True)
            }
            experts.place(source, *matrices[source.path], experts.rows_of(source))
        out = torch.randn(7, 16 // size)
        q, v = (loop(x, weights, *matrices[s.path], s.carried) for s in sources)
        expected = torch.cat([q.chunk(size, 1)[rank], torch.zeros(7, 4 // size), v.chunk(size, 1)[rank]], 1)
        torch.testing.assert_close(experts(x, out.clone()) - out, expected, rtol=1e-5, atol=1e-5)


def test_cut_by_input_adds_up():
    x, weights = torch.randn(7, 12), torch.rand(7, 3)
    source, A, B = Source("o", 0, Q), torch.randn(12, 12), torch.randn(6, 12)
    total = torch.zeros(7, 6)
    for rank in range(2):
        geometry = Geometry(12, (6,), (1,), rank, 2, "inputs")
        (experts,) = mixture(weights, (geometry, [source]))
        experts.place(source, A, B, experts.rows_of(source))
        total += experts(x[:, geometry.own_inputs], torch.zeros(7, 6))
    torch.testing.assert_close(total, loop(x, weights, A, B, Q), rtol=1e-5, atol=1e-5)


def test_equal_patterns_are_computed_once():
    linear = Geometry(12, (6,), (1,)), [Source("o", None, Q)]
    first, second, third = mixture(torch.rand(2, 3), linear, linear, (linear[0], [Source("x", None, V)]))
    assert (first.pattern, second.pattern, third.pattern) == (0, 0, 1)
    assert [tuple(factor.shape) for factor in first.in_force.factors] == [(2, 12), (2, 2)]


class Method:
    """A quantization method as vLLM has them."""

    def apply(self, layer, x, bias=None):
        return x @ layer.weight.t() + (0 if bias is None else bias)


def test_a_linear_keeps_its_type_and_a_shared_method_stays_as_it_was():
    linear, other, method = nn.Linear(12, 6), nn.Linear(12, 6), Method()
    linear.quant_method = other.quant_method = method
    weights, x = torch.rand(5, 3), torch.randn(5, 12)
    (experts,) = mixture(weights, (Geometry(12, (6,), (1,)), [source := Source("o", None, Q)]))
    A, B = torch.randn(12, 12), torch.randn(6, 12)
    experts.place(source, A, B, range(6))
    add_to(linear, experts)
    assert type(linear) is nn.Linear
    assert type(linear.quant_method).__name__ == "Method"
    assert other.quant_method is method
    assert type(method) is Method
    with torch.no_grad():
        found = linear.quant_method.apply(linear, x, linear.bias)
        torch.testing.assert_close(found, linear(x) + loop(x, weights, A, B, Q), rtol=1e-5, atol=1e-5)


def test_matrices_that_one_linear_computes_belong_together():
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_up_proj"]}
    modules = {"l.1.attn.v_proj": V, "l.1.mlp.gate_up_proj": Q, "l.1.attn.q_proj": Q, "l.2.attn.v_proj": V, "head": V}
    assert sources_by_linear(modules, packed, str) == {
        "l.1.attn.qkv_proj": [Source("l.1.attn.q_proj", 0, Q), Source("l.1.attn.v_proj", 2, V)],
        "l.1.mlp.gate_up_proj": [Source("l.1.mlp.gate_up_proj", None, Q)],
        "l.2.attn.qkv_proj": [Source("l.2.attn.v_proj", 2, V)],
        "head": [Source("head", None, V)],
    }


def test_matrices_keep_their_names_where_vllm_has_others():
    found = sources_by_linear({"gpt_neox.layers.1.fc": V, "gone": V}, {}, {"gpt_neox.layers.1.fc": "model.1.fc"}.get)
    assert found == {"model.1.fc": [Source("gpt_neox.layers.1.fc", None, V)], "gone": [Source("gone", None, V)]}
