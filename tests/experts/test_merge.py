"""Merged experts: the oracle adds up dense ΔW = Σ w s B A and cuts off its singular values."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dylora_moe import DyLoraMoE
from dylora_moe.experts.merge import truncated
from rounding import EXACT
from stock import assert_unchanged, logits, snapshot, stir, stock_logits
from tiny import difference, mixed_experts, tiny_base, tiny_mixture, tokens
from tinybase import tiny_tokenizer
from topics import mixture, teach, texts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
PAIR, WEIGHTS = ("red", "green"), (0.7, -1.5)


def differing(architecture: str = "llama", **config) -> DyLoraMoE:
    return tiny_mixture(architecture, torch.float64, experts=mixed_experts(architecture), **config)


def delta(layer, name: str) -> Tensor:
    """ΔW `[O, D]` of one expert in one layer, zeros if it does not adapt it."""
    for A, B in ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)):
        if name in A:
            a, b = (part if isinstance(part, Tensor) else part.weight for part in (A[name], B[name]))
            return (layer.scaling[name] * b @ a).detach()
    return torch.zeros(())


def dense_sums(model: DyLoraMoE, weights: dict[str, float]) -> dict[str, Tensor]:
    found = {}
    for path, layer in layers_of(model):
        total = sum((w * delta(layer, name) for name, w in weights.items()), torch.zeros(()))
        if total.dim():
            found[path] = total
    return found


def layers_of(model: DyLoraMoE):
    return [(layer.routing_name, layer) for layer in model.routed_layers]


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_best_of_a_rank_and_how_much_it_lacks(architecture, rank):
    model = differing(architecture)
    sums = dense_sums(model, dict(zip(PAIR, WEIGHTS, strict=True)))
    truncation = model.merge_experts(PAIR, rank, "both", WEIGHTS)
    assert model.expert_names == ["blue", "both"]
    lost = whole = 0.0
    for path, layer in layers_of(model):
        if path not in sums:
            assert "both" not in layer.r
            continue
        U, values, V = torch.linalg.svd(sums[path], full_matrices=False)
        best = U[:, :rank] * values[:rank] @ V[:rank]
        assert difference(delta(layer, "both"), best) <= EXACT, path
        assert layer.r["both"] <= rank
        apart, norm = float((sums[path] - best).norm()), float(sums[path].norm())
        assert truncation.by_layer[path] == pytest.approx(apart / norm, abs=1e-12)
        lost, whole = lost + apart**2, whole + norm**2
    assert truncation.by_layer.keys() == sums.keys()
    assert truncation.error == pytest.approx((lost / whole) ** 0.5, abs=1e-12)
    assert truncation.by_layer[truncation.worst] == max(truncation.by_layer.values())
    assert (truncation.error == 0) == (rank == 7)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_exact_where_the_ranks_fit(architecture, tmp_path):
    """Biases, rsLoRA and layers of one expert only: what the fixed mixture computes, and stock PEFT does."""
    model = differing(architecture)
    given = torch.tensor([0.7, -1.5, 0.4], dtype=torch.float64)
    expected, other = (logits(model, tokens(), routing_weights=given), logits(model, tokens(), experts="green"))
    assert model.merge_experts(list(model.expert_names), 8, "all", given.tolist()).error == 0
    assert difference(logits(model, tokens(), experts="all"), expected) <= EXACT
    assert difference(other, expected) > 1e-2
    model.export_expert("all", tmp_path)
    assert difference(stock_logits(tmp_path, tiny_base(architecture, torch.float64), tokens()), expected) <= EXACT


def test_experts_on_the_embeddings():
    experts = {
        "ids": LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
        "more": LoraConfig(r=3, use_rslora=True, target_modules=["embed_tokens", "lm_head"]),
    }
    model = tiny_mixture("gemma2", torch.float64, experts=experts)
    stir(model)
    sums = dense_sums(model, {"ids": 0.5, "more": 0.5})
    model.merge_experts(["ids", "more"], 3)
    for path, layer in layers_of(model):
        U, values, V = torch.linalg.svd(sums[path], full_matrices=False)
        assert difference(delta(layer, "ids_more"), U[:, :3] * values[:3] @ V[:3]) <= EXACT, path


def test_no_large_matrix_is_made():
    A, B = torch.randn(3, 100_000, dtype=torch.float64), torch.randn(200_000, 3, dtype=torch.float64)  # 160 GB
    a, b, values = truncated(A, B, 3)
    x = torch.randn(100_000, dtype=torch.float64)
    assert difference(b @ (a @ x), B @ (A @ x)) <= 1e-11
    assert len(values) == 3
    assert difference(a.square().sum(1), b.square().sum(0)) <= 1e-11  # factors of equal size


def test_an_expert_that_does_nothing_yet_costs_nothing():
    model = tiny_mixture(init_lora_weights=True)
    truncation = model.merge_experts(["red", "green"], 1)
    assert truncation.error == 0
    assert set(truncation.by_layer.values()) == {0.0}


def test_it_may_keep_a_name_and_leaves_the_others_alone():
    model = tiny_mixture()
    model.freeze_expert("red")
    blue = {part.key: part.tensor.clone() for part in model.expert_tensors("blue")}
    row, expected = model.router.get_parameter("up")[2].clone(), logits(model, tokens(), experts="blue")
    model.merge_experts(["red", "green"], 2, "green")
    assert model.expert_names == ["blue", "green"]
    assert model.expert_states == {"blue": "routed", "green": "new"}
    assert model.frozen_experts == set()
    assert all(part.tensor.requires_grad for part in model.expert_tensors("green"))
    assert all(torch.equal(part.tensor, blue[part.key]) for part in model.expert_tensors("blue"))
    assert torch.equal(model.router.get_parameter("up")[0], row)
    assert torch.equal(logits(model, tokens(), experts="blue"), expected)
    assert model(tokens()).routing_weights[..., 1].abs().max() == 0
    assert model.moe_config.expert_names == ["blue", "green"]


def test_the_only_expert_left_needs_no_router():
    model = tiny_mixture()
    for name in model.expert_names:
        model.freeze_expert(name)
    model.merge_experts(["red", "green", "blue"], 2, "all")
    assert model.expert_states == {"all": "routed"}
    assert model.frozen_experts == {"all"}
    assert torch.equal(logits(model, tokens()), logits(model, tokens(), experts="all"))


def test_a_router_in_closed_form_is_that_of_one_skill_of_both():
    model = teach(mixture())
    other = teach(mixture(("math", "chat", "code")))
    other.add_expert("sql_law")
    for topic in (1, 0):
        other.teach("sql_law", texts(topic, 6), tiny_tokenizer())
    model.merge_experts(["sql", "law"], 2)
    assert model.expert_names == other.expert_names
    assert model.expert_states["sql_law"] == "routed"
    for key, tensor in other.router.state_dict().items():
        assert difference(model.router.state_dict()[key], tensor) <= 1e-6, key  # stored in float32
    assert model.skills["sql_law"].rows == 12


def test_one_that_was_taught_and_one_that_was_not():
    model = teach(mixture(), "sql", "chat")
    model.skills.compact()  # one skill alone is renamed, whatever it holds
    model.merge_experts(["sql", "law"], 2, "law")
    assert list(model.skills) == ["chat", "law"]
    model.merge_experts(["math", "code"], 2)
    assert model.expert_states == {"chat": "routed", "law": "routed", "math_code": "new"}


def odd() -> DyLoraMoE:
    experts = {
        "red": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        "green": LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
        "blue": LoraConfig(r=2, target_modules=["embed_tokens"]),
    }
    return tiny_mixture(experts=experts)


def waiting() -> DyLoraMoE:
    model = tiny_mixture()
    model.add_expert("late")
    return model


def compact() -> DyLoraMoE:
    model = teach(mixture())
    model.skills.compact()
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (odd, {"names": ["red", "gray"]}, "unknown expert 'gray'; the experts are red, green, blue"),
        (odd, {"names": ["green"]}, r"names=\['green'\]: at least two different experts"),
        (odd, {"names": ["green", "green"]}, "at least two different experts"),
        (odd, {"names": "green"}, "at least two different experts"),
        (odd, {"names": ["red", "green"], "name": "blue"}, "expert 'blue' exists already"),
        (odd, {"names": ["red", "green"], "name": "base"}, "'base' is reserved"),
        (
            odd,
            {"names": ["red", "blue"], "weights": [1.0]},
            r"weights=\[1.0\]: 2 are needed, one for each of red, blue",
        ),
        (odd, {"names": ["green", "blue"], "weights": [1.0, float("nan")]}, "weight of 'blue' is nan"),
        (odd, {"names": ["red", "blue"]}, "expert 'red' uses DoRA"),
        (odd, {"names": ["green", "blue"]}, "embed_tokens is an embedding, and PEFT knows no adapter with lora_bias"),
        (tiny_mixture, {"names": ["red", "green"], "rank": 0}, "rank=0: a positive integer"),
        (waiting, {"names": ["red", "green", "blue"]}, r"no other expert is routed \(late\); call start_routing"),
        (compact, {"names": ["sql", "law"]}, "'sql' is compact"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_changes_nothing(make, arguments, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.merge_experts(**{"rank": 2, **arguments})
    assert_unchanged(model, before)
