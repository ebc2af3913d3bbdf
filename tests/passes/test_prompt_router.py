"""The router without the experts chooses as the whole mixture does, from less."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dylora_moe import DyLoraMoE
from dylora_moe.passes.prompt_router import PromptRouter
from dylora_moe.routing.decision import largest
from families import family_base
from tiny import COMBINATIONS, PLACEMENTS, difference, tiny_base, tiny_mixture, tokens
from tinybase import save_tiny_base
from topics import NAMES, mixture, teach


def saved(model: DyLoraMoE, folder: Path, base: Any) -> PromptRouter:
    """The router of a mixture that is saved, over a bare base."""
    model.save_pretrained(folder)
    return PromptRouter.from_pretrained(folder, base=copy.deepcopy(base))


def prompts(count: int) -> list[torch.Tensor]:
    return [tokens(1, 1 + seed % 17, seed=seed) for seed in range(count)]


def weights_of(model: DyLoraMoE, ids: torch.Tensor) -> torch.Tensor:
    """`[1, E]` by the whole mixture at sequence granularity."""
    with torch.no_grad():
        return model(ids).routing_weights[:, 0]


@pytest.mark.parametrize(("architecture", "placement"), COMBINATIONS)
def test_it_decides_as_the_mixture(architecture, placement, tmp_path):
    base = tiny_base(architecture)
    model = tiny_mixture(architecture, base=copy.deepcopy(base), granularity="sequence", **PLACEMENTS[placement])
    router, seen = saved(model, tmp_path, base), []
    for ids in prompts(24):
        expected = weights_of(model, ids)
        assert difference(router(ids), expected) <= 1e-5
        assert router.choose(ids[0].tolist()) == largest(expected[0].tolist(), model.expert_names)
        seen.append(expected)
    assert torch.cat(seen).std(0).max() > 0.05  # prompts do not all weigh the same


@pytest.mark.parametrize(
    "settings",
    [
        {"router_type": "linear"},
        {"top_k": 1},
        {"route_to_base": True},
        {"route_to_base": True, "top_k": 1},
        {"granularity": "token"},
        {"granularity": "prefix", "temperature": 0.3},
    ],
    ids=str,
)
def test_routers_of_every_kind(settings, tmp_path):
    base = tiny_base()
    model = tiny_mixture(base=copy.deepcopy(base), **settings)
    model.add_expert("late")  # new: never chosen
    router, chosen = saved(model, tmp_path, base), set()
    model.moe_config.granularity = "sequence"
    for ids in prompts(40):
        expected = weights_of(model, ids)[0].tolist()
        assert router(ids)[0].tolist() == pytest.approx(expected, abs=1e-5)
        chosen.add(router.choose(ids[0].tolist()))
        assert router.choose(ids[0].tolist()) == largest(expected, model.expert_names)
    assert chosen == {"red", "green", "blue"} | ({"base"} if settings.get("route_to_base") else set())


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_router_in_closed_form(granularity, tmp_path):
    model = mixture(NAMES[:3], granularity=granularity)
    teach(model)
    model.base_name = save_tiny_base(tmp_path / "base")
    model.save_pretrained(tmp_path / "own")
    router = PromptRouter.from_pretrained(tmp_path / "own")
    model.moe_config.granularity = "sequence"
    for ids in prompts(24):
        assert difference(router(ids), weights_of(model, ids)) <= 1e-5
    assert router.separator == model.skills.separator


@pytest.mark.parametrize("family", ["gemma3n_text", "lfm2", "mamba", "gpt_oss"])
def test_families_run_without_their_upper_layers(family, tmp_path):
    base = family_base(family)
    model = tiny_mixture(
        base=copy.deepcopy(base), granularity="sequence", router_layer=2, target_modules=["q_proj", "in_proj"]
    )
    router, ids = saved(model, tmp_path, base), tokens(1, 9) % 60
    assert difference(router(ids), weights_of(model, ids)) <= 1e-4


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_does_not_decide_is_dropped(placement, tmp_path):
    base = tiny_base(tie_word_embeddings=placement == "middle")
    model = tiny_mixture(base=copy.deepcopy(base), **PLACEMENTS[placement])
    router, k = saved(model, tmp_path, base), model.router_layer_index
    names = {name for name, _ in router.named_parameters()}
    assert not [name for name in names if "lora" in name or "lm_head" in name]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names if "layers." in name} == set(range(k))
    layers = len(list(base.model.layers[0].parameters()))
    assert len(names) == k * layers + 2 + len(list(model.router.parameters()))  # embeddings and the last norm
    assert router.to(torch.device("cpu")).device.type == "cpu"
    assert not any(parameter.requires_grad for parameter in router.parameters())


def test_experts_are_not_read(tmp_path):
    base = tiny_base()
    model = tiny_mixture(base=copy.deepcopy(base), granularity="sequence")
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*/adapter_model.safetensors"):
        file.unlink()
    ids = tokens(1, 5)
    router = PromptRouter.from_pretrained(tmp_path, base=base)
    assert difference(router(ids), weights_of(model, ids)) <= 1e-5


def test_a_mixture_without_a_routed_expert_is_refused(tmp_path):
    model = mixture(NAMES[:2])
    model.base_name = save_tiny_base(tmp_path / "base")
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"no expert .* is routed yet.*dylora-moe teach"):
        PromptRouter.from_pretrained(tmp_path / "own")
