"""Every number of gradient report and parameter report, computed by hand."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from dylora_moe import DyLoraMoE, MoELoraConfig, gradient_report
from dylora_moe.reports import GradientStats, parameter_report
from tiny import LAYERS, VOCAB, WIDTH, tiny_base, tiny_config, tiny_mixture, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


def test_gradient_statistics_by_hand():
    parameters = [nn.Parameter(torch.zeros(3, 1)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([[1.0], [-4.0], [0.0]])
    parameters[2].grad = torch.tensor([-5.0])
    assert GradientStats.of(parameters) == GradientStats(3, 2, 0.0, 5.0, 2.5)
    assert GradientStats.of(parameters[1:2]) == GradientStats(1, 0, 0.0, 0.0, 0.0)


def gpt2_mixture() -> DyLoraMoE:
    config = MoELoraConfig(
        num_experts=2, r=8, lora_alpha=16, target_modules=["c_attn"], router_layer=0, balance_coefficient=0.01
    )
    torch.manual_seed(0)
    model = DyLoraMoE.from_base(tiny_base("gpt2", n_layer=12), config)
    for name in model.expert_names:  # with B = 0 no gradient would reach A or the router
        for tensor in model.expert_tensors(name):
            tensor.tensor.data.normal_(std=0.1)
    return model.train()


@pytest.mark.parametrize(
    ("experts", "counts"),
    [
        (None, {"expert_0": 24, "expert_1": 24, "router": 2, "frozen": 0}),
        ("expert_0", {"expert_0": 24, "expert_1": 0, "router": 0, "frozen": 0}),
        ("expert_1", {"expert_0": 0, "expert_1": 24, "router": 0, "frozen": 0}),
    ],
)
def test_gradients_of_the_gpt2_shape(experts, counts):
    model = gpt2_mixture()
    with model.trace() as trace:
        model(tokens(), labels=tokens(), experts=experts).loss.backward()
    report = gradient_report(model)
    assert {name: stats.with_gradient for name, stats in report.items()} == counts
    assert {name: stats.tensors for name, stats in report.items()} == {
        "expert_0": 24,
        "expert_1": 24,
        "router": 2,
        "frozen": len(list(tiny_base("gpt2", n_layer=12).parameters())),
    }
    assert len(trace.layers_reached) == 12
    for name, parameters in (("router", model.router.parameters()), ("expert_0", None), ("expert_1", None)):
        if parameters is None:
            parameters = [tensor.tensor for tensor in model.expert_tensors(name)]
        values = [abs(v) for p in parameters if p.grad is not None for v in p.grad.flatten().tolist()] or [0.0]
        stats = report[name]
        assert stats.minimum == pytest.approx(min(values), rel=1e-5)
        assert stats.maximum == pytest.approx(max(values), rel=1e-5)
        assert stats.mean == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_balance_loss_reaches_the_router_and_nothing_else():
    model = gpt2_mixture()
    model(tokens(), labels=tokens()).aux_loss.backward()
    report = gradient_report(model)
    assert {name: stats.with_gradient for name, stats in report.items() if stats.with_gradient} == {"router": 2}
    assert report["router"].maximum > 0


def test_dora_magnitudes_count_once():
    model = tiny_mixture(experts={"dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)}).train()
    model(tokens(), labels=tokens(), experts="dora").loss.backward()
    assert gradient_report(model)["dora"].with_gradient == 3 * LAYERS
    assert model.parameter_report().experts == {"dora": LAYERS * (2 * (WIDTH + WIDTH) + WIDTH)}


# ---------------------------------------------------------------------- parameter_report

LLAMA_BASE = 2 * VOCAB * WIDTH + WIDTH + LAYERS * (2 * WIDTH * 16 + 2 * WIDTH * 8 + 3 * WIDTH * 24 + 2 * WIDTH)


def test_parameters_by_hand():
    model = tiny_mixture(router_hidden_size=5, route_to_base=True)
    report = model.parameter_report()
    per_layer = (WIDTH + 16) + (WIDTH + 8) + (24 + WIDTH)  # q, v, down
    expert = 3 * 3 * per_layer  # rank 3, layers 1 to 3
    assert report.experts == {"red": expert, "green": expert, "blue": expert}
    assert report.router == 5 * WIDTH + 4 * 5
    assert report.base == LLAMA_BASE
    assert report.trainable == 3 * expert + report.router
    assert report.base_bytes == 4 * LLAMA_BASE
    assert report.overhead == pytest.approx(100 * (3 * expert + report.router) / LLAMA_BASE)
    rows = {row["part"]: (row["parameters"], row["percent of base"]) for row in report.table()}
    assert list(rows) == ["red", "green", "blue", "router", "base (frozen)"]
    assert rows["red"] == (expert, pytest.approx(100 * expert / LLAMA_BASE))
    assert rows["base (frozen)"] == (LLAMA_BASE, 100.0)
    model.freeze_expert("red")
    assert model.parameter_report().trainable == report.trainable - expert


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_four_experts_bring_no_second_copy_of_the_base(architecture):
    """Storages of everything that hangs on the mixture, counted once, before and after it is used."""
    alone = tiny_base(architecture)
    names = ["one", "two", "three", "four"]
    model = DyLoraMoE(tiny_base(architecture), tiny_config(expert_names=names, router_layer=0))
    report = model.parameter_report()
    base_bytes = storage_bytes(alone)
    assert report.base == sum(p.numel() for p in alone.parameters())  # a tied head once
    assert report.base_bytes == 4 * report.base
    temperature = 4  # bytes, for compiled graphs
    total = base_bytes + 4 * (sum(report.experts.values()) + report.router) + temperature
    assert storage_bytes(model) == total
    model.train()(tokens(), labels=tokens()).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval().generate(tokens(), max_new_tokens=3, do_sample=False)
    model(tokens())
    assert storage_bytes(model) == total


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all storages that the modules of `model` hold, parameters, buffers and plain attributes alike."""
    found: dict[int, int] = {}

    def visit(value: object, depth: int) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif depth and isinstance(value, dict):
            for item in value.values():
                visit(item, depth - 1)
        elif depth and isinstance(value, (list, tuple)):
            for item in value:
                visit(item, depth - 1)
        elif depth and type(value).__module__.startswith("dylora_moe") and not isinstance(value, nn.Module):
            visit(getattr(value, "__dict__", {}), depth - 1)

    for module in model.modules():
        visit(module.__dict__, 6)
    return sum(found.values())


def test_a_wrapper_without_memory_counts_what_it_wraps():
    """As torchao's quantized weights: the address of their storage cannot be asked for."""
    plain = torch.arange(12.0)
    wrapper = TwoTensor(plain, torch.zeros(12))
    with pytest.raises(RuntimeError, match="data pointer"):
        wrapper.untyped_storage().data_ptr()
    frozen = [nn.Parameter(wrapper, requires_grad=False), nn.Parameter(plain, requires_grad=False)]
    report = parameter_report({"frozen": frozen, "router": [], "a": []})
    assert (report.base, report.base_bytes) == (24, 4 * (12 + 12))
