"""The mixture's tensors: all of them, no others, each of its shape, and in the order in which vLLM keeps the rows."""

import pytest
import torch
from torch import nn

from dylora_moe_vllm.experts import Experts, Source
from dylora_moe_vllm.geometry import Geometry
from dylora_moe_vllm.in_force import InForce, Patterns
from dylora_moe_vllm.loading import Loader, LoadError
from dylora_moe_vllm.router import Router
from dylora_moe_vllm.settings import Carried, parse
from plugin_section import section

Q = (Carried(0, 4, 2.0), Carried(2, 8, 0.5))
PATH = "model.h.1.attn.qkv"


def tensors():
    return {
        "dylora.router.down": torch.randn(8, 16),
        "dylora.router.up": torch.randn(3, 8),
        f"dylora.experts.{PATH}.A": torch.randn(12, 16),
        f"dylora.experts.{PATH}.B": torch.randn(12, 12),
    }


def load(mixture: dict, base: dict, loaded: torch.Tensor | None = None, part: int | None = None):
    """A linear of three parts of 4 with one matrix; `loaded` is what vLLM made of its weight."""
    router, linear = Router(parse(section()), 16), nn.Linear(16, 12, bias=False)
    if loaded is None:
        del linear.weight
    else:
        linear.weight = nn.Parameter(loaded)
    source = Source(PATH, part, Q)
    experts = Experts(Geometry(16, (4, 4, 4), (1, 1, 1)), [source], InForce(), Patterns(), torch.float32)
    loader = Loader(router, [(linear, experts, [source])], torch.float32)
    rest = list(loader.of_base([*mixture.items(), *base.items()]))
    loader.place()
    return router, experts, rest


def test_takes_its_own_and_leaves_the_base():
    mixture, base = tensors(), {f"{PATH}.weight": torch.randn(12, 16), "other": torch.zeros(1)}
    router, experts, rest = load(mixture, base, base[f"{PATH}.weight"].clone())
    assert [name for name, _ in rest] == list(base)
    assert torch.equal(router.up, mixture["dylora.router.up"])
    assert torch.equal(experts.A, mixture[f"dylora.experts.{PATH}.A"])
    assert torch.equal(experts.B[0], mixture[f"dylora.experts.{PATH}.B"])


@pytest.mark.parametrize("name", [f"{PATH}.weight", "h.1.attn.qkv.weight"])
def test_rows_follow_those_of_the_base(name: str):
    mixture, weight, order = tensors(), torch.randn(12, 16), torch.randperm(12)
    _, experts, _ = load(mixture, {name: weight}, weight[order])
    assert torch.equal(experts.B[0], mixture[f"dylora.experts.{PATH}.B"][order])


def test_a_conv1d_has_its_weight_the_other_way():
    mixture, weight = tensors(), torch.randn(12, 16)
    _, experts, _ = load(mixture, {f"{PATH}.weight": weight.t()}, weight.clone())
    assert torch.equal(experts.B[0], mixture[f"dylora.experts.{PATH}.B"])


def test_an_order_that_cannot_be_told_is_refused():
    weight = torch.randn(12, 16)
    with pytest.raises(LoadError, match=f"{PATH}: in which order"):
        load(tensors(), {f"{PATH}.weight": weight}, weight * 2)
    with pytest.raises(LoadError, match=f"{PATH}: in which order"):
        load(tensors(), {}, None)


def test_a_quantized_part_of_its_own_goes_by_geometry():
    mixture = tensors() | {f"dylora.experts.{PATH}.B": torch.randn(4, 12)}
    _, experts, _ = load(mixture, {}, None, part=1)
    assert torch.equal(experts.B[0], mixture[f"dylora.experts.{PATH}.B"])


@pytest.mark.parametrize("name", list(tensors()))
def test_missing(name: str):
    mixture = tensors()
    del mixture[name]
    with pytest.raises(LoadError, match=f"{name} is missing"):
        load(mixture, {}, None)


def test_one_that_nothing_asks_for():
    with pytest.raises(LoadError, match=r"dylora.router.bias is no tensor of this mixture"):
        load(tensors() | {"dylora.router.bias": torch.zeros(3)}, {}, None)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 9), r"\[3, 9\]: expected floating point \[3, 8\]"),
        (torch.zeros(3, 8, dtype=torch.int64), "int64"),
        (torch.full((3, 8), float("nan")), "not finite"),
    ],
)
def test_wrong_tensor_is_named(tensor: torch.Tensor, message: str):
    with pytest.raises(LoadError, match=message) as caught:
        load(tensors() | {"dylora.router.up": tensor}, {}, None)
    assert "dylora.router.up" in str(caught.value)
