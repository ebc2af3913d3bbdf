"""Stock adapters for vLLM: stock PEFT loads them, and they answer as the mixture does when it is forced to the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from dylora_moe import DyLoraMoE
from dylora_moe.exporting import adapters
from tiny import ATTENTION_INPUT, difference, tiny_base, tiny_config, tiny_mixture, tokens

HALF = {"red": 0.5, "blue": -0.25}


def mixed(architecture: str) -> dict[str, LoraConfig]:
    """Experts on different modules, one of them with ranks and scalings of its own in one layer."""
    attention, other = ATTENTION_INPUT.get(architecture, "q_proj"), "c_fc" if architecture == "gpt2" else "down_proj"
    common = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    pattern = rf"2\..*{other}"
    return {
        "red": LoraConfig(r=3, lora_alpha=5, target_modules=[attention, other], **common),
        "green": LoraConfig(
            r=2,
            lora_alpha=4,
            use_rslora=True,
            target_modules=[attention, other],
            rank_pattern={pattern: 7},
            alpha_pattern={pattern: 1},
            **common,
        ),
        "blue": LoraConfig(r=6, lora_alpha=1, target_modules=[other], **common),
    }


def stock(architecture: str, folder: Path) -> Tensor:
    model = PeftModel.from_pretrained(tiny_base(architecture), str(folder)).eval()
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_stock_peft_answers_as_the_mixture_is_forced_to(architecture, tmp_path):
    model = tiny_mixture(architecture, experts=mixed(architecture), router_layer=0)
    command = model.export_vllm_lora(tmp_path / "out", {"half_": HALF})
    for name in model.expert_names:
        with torch.no_grad():
            assert difference(stock(architecture, tmp_path / "out" / name), model(tokens(), experts=name).logits) < 1e-5
    weights = torch.tensor([0.5, 0.0, -0.25])
    with torch.no_grad():
        expected = model(tokens(), routing_weights=weights).logits
    assert difference(stock(architecture, tmp_path / "out" / "half_"), expected) < 1e-5
    ranks = {name: _config(tmp_path / "out" / name) for name in (*model.expert_names, "half_")}
    assert {name: (config.r, config.rank_pattern) for name, config in ranks.items()} == {
        "red": (3, {}),
        "green": (8, {}),
        "blue": (6, {}),
        "half_": (16, {}),
    }
    assert f"--max-lora-rank 16 \\\n  --lora-modules red={tmp_path}/out/red" in command
    assert "--max-loras 4 " in command


def _config(folder: Path) -> Any:
    return PeftConfig.from_pretrained(str(folder))


def test_an_expert_is_written_as_it_is_where_vllm_reads_it_so(tmp_path):
    model = tiny_mixture(experts=mixed("llama"), router_layer=0)
    model.export_vllm_lora(tmp_path / "out")
    model.export_expert("red", tmp_path / "red")
    found, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out/red", tmp_path / "red")
    )
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve path/to/the/base \\" in text
    assert "red=out/red green=out/green blue=out/blue" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (33, 64), (257, 320), (512, 512)])
def test_ranks_are_those_that_vllm_allows(rank, allowed):
    assert adapters._allowed("half", rank) == allowed


def test_a_rank_above_the_largest_is_refused(tmp_path):
    model = DyLoraMoE(tiny_base(), tiny_config(target_modules=["q_proj"], r=200))
    model.export_vllm_lora(tmp_path / "two", {"both": {"red": 1.0, "blue": 1.0}})
    with pytest.raises(ValueError, match=r"all would be of rank 600, .* 512 at most: take fewer experts, or cut them"):
        model.export_vllm_lora(tmp_path / "out", {"all": dict.fromkeys(model.expert_names, 1.0)})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_what_vllm_has_no_place_for_is_refused(tmp_path, setting):
    model = tiny_mixture(**{setting: True})
    with pytest.raises(ValueError, match=f"expert 'red' has {setting}=True"):
        model.export_vllm_lora(tmp_path / "out")


def test_nothing_is_written_beside_other_files(tmp_path):
    model = tiny_mixture()
    (tmp_path / "out").mkdir()
    model.export_vllm_lora(tmp_path / "out")
    with pytest.raises(ValueError, match="is there already and not empty"):
        model.export_vllm_lora(tmp_path / "out")


def test_values_that_are_not_finite_are_named(tmp_path):
    model = tiny_mixture()
    model.routed_layers[0].lora_A["green"].weight.data[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"green: base_model\.model\..*lora_A\.weight holds values that are not finite"
    ):
        model.export_vllm_lora(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(adapters, "write_adapter_files", fails)
    with pytest.raises(OSError, match="disk full"):
        tiny_mixture().export_vllm_lora(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_fixed_mixtures_are_checked(tmp_path):
    model = tiny_mixture()
    with pytest.raises(TypeError, match=r"no fixed mixture: map experts to weights"):
        model.export_vllm_lora(tmp_path / "out", json.loads('{"half": ["red"]}'))
    with pytest.raises(TypeError, match="map names to weights"):
        model.export_vllm_lora(tmp_path / "out", json.loads('["red"]'))
