"""Compiled mixtures: full graphs, few of them, and the plain run's numbers."""

import functools
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from dylora_moe import DyLoraMoE, MoELoraConfig
from rounding import FLOAT32
from tiny import difference
from tinybase import tiny_base

BACKENDS = (
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")],
    ),
)
SETTINGS = {
    "dense": {"top_k": 4},
    "top-2": {"top_k": 2},
    "pass before": {"router_layer": "last"},
    "prefix": {"granularity": "prefix"},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def mixture(**settings) -> DyLoraMoE:
    torch.manual_seed(0)
    config = MoELoraConfig(num_experts=4, r=4, init_lora_weights=False, **{"router_layer": 1, **settings})
    return DyLoraMoE.from_base(tiny_base(2), config).eval()


def graphs() -> int:
    return counters["stats"].get("unique_graphs", 0)


def ids(length: int) -> torch.Tensor:
    return torch.randint(2, 60, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.slow  # in short: the two below
@pytest.mark.parametrize("name", SETTINGS)
def test_two_graphs_serve_every_length_new_weights_and_temperatures(name):
    plain, fast = mixture(**SETTINGS[name]), mixture(**SETTINGS[name])
    fast.compile(backend="aot_eager", fullgraph=True)
    for length in (12, 17, 23, 31):
        found, expected = (model(ids(length), use_cache=False).logits for model in (fast, plain))
        assert difference(found, expected) <= FLOAT32
    assert 1 <= graphs() <= 2
    assert not counters["graph_break"]
    before = graphs()
    for model in (plain, fast):
        model.moe_config.temperature = 0.5
        for parameter in model.parameters():
            parameter.data.mul_(1.01)
    assert difference(fast(ids(17), use_cache=False).logits, plain(ids(17), use_cache=False).logits) <= FLOAT32
    assert graphs() == before


@torch.no_grad()
def test_one_graph_serves_every_forced_expert():
    plain, fast = mixture(), mixture()
    fast.compile(backend="aot_eager", fullgraph=True)
    seen = []
    for experts in ("expert_1", "expert_2", "expert_0", "base"):
        found = fast(ids(12), use_cache=False, experts=experts)
        expected = plain(ids(12), use_cache=False, experts=experts)
        assert difference(found.logits, expected.logits) <= FLOAT32
        assert torch.equal(found.routing_weights, expected.routing_weights)
        seen.append(graphs())
    assert seen == [1, 1, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_step_is_one_graph_with_the_plain_gradients(backend):
    plain, fast = mixture().train(), mixture().train()
    fast.compile(backend=backend, fullgraph=True)
    for model in (plain, fast):
        model(ids(12), labels=ids(12), use_cache=False).loss.backward()
    for (name, one), other in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or difference(one.grad, other.grad) <= 1e-4, name
    assert graphs() == 1


@pytest.mark.parametrize("granularity", ["token", pytest.param("prefix", marks=pytest.mark.slow)])
def test_compiled_decoding_with_a_static_cache(granularity):
    plain, fast = mixture(granularity=granularity), mixture(granularity=granularity)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    fast.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(fast.generate(ids(12), **options), plain.generate(ids(12), **options))
    assert not counters["graph_break"]
    once = graphs()
    assert torch.equal(fast.generate(ids(12), **options), plain.generate(ids(12), **options))
    assert graphs() == once <= 3  # the prompt, the tokens, and one more for the number of positions


def made(model, lengths, **options) -> int:
    """How many graphs there are once prompts of these lengths have been continued."""
    for length in lengths:
        model.generate(ids(length), max_new_tokens=3, do_sample=False, cache_implementation="static", **options)
    return graphs()


@functools.cache
def graphs_of_the_base() -> int:
    base = tiny_base(2).eval()
    base.compile(backend="aot_eager", fullgraph=True)
    count = made(base, (12, 17, 31, 12, 40))
    torch._dynamo.reset()
    counters.clear()
    return count


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "top-2", "prefix"])
def test_compiled_generation_makes_no_more_graphs_than_the_bare_base(name):
    """Over prompt lengths, new weights, another temperature and the next call; forced experts add theirs once."""
    allowed = graphs_of_the_base()
    fast = mixture(**SETTINGS[name])
    fast.compile(backend="aot_eager", fullgraph=True)
    assert made(fast, (12, 17)) <= allowed
    for parameter in fast.parameters():
        parameter.data.mul_(1.01)
    fast.moe_config.temperature = 0.5
    assert made(fast, (31, 12, 40)) <= allowed
    with_forced = made(fast, (12, 17), experts="expert_1")
    assert made(fast, (40,), experts="expert_2") == with_forced <= 2 * allowed
