"""What cannot be served by vLLM is refused before anything is written, with the reason and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from dylora_moe import DyLoraMoE
from dylora_moe.routing.policies import POLICIES, softmax_of_best
from tiny import tiny_base, tiny_config, tiny_mixture

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"router_layer": "last"}, r'router_layer="last": every token .* twice.*dylora-moe serve'),
    (
        {"router_layer": 2, "layers_to_transform": [0, 1, 2, 3]},
        r"model.layers.0.*, below decoder layer 2.* routing pass.*--to vllm-lora.*router at layer 0 or lower",
    ),
    ({"target_modules": ["q_proj", "lm_head"]}, r"adapts lm_head: .*not to embeddings or the head; .*target_modules"),
    (
        {"target_modules": ["q_proj", "embed_tokens"], "router_layer": 0},
        r"adapts model.embed_tokens: .*not to embeddings or the head",
    ),
    ({"granularity": "sequence"}, r"first tokens of a prompt would depend on its last.*--granularity prefix"),
    ({"use_dora": True}, r"expert 'red' has use_dora=True, so that it adds more than.*--to peft"),
    ({"lora_bias": True}, r"expert 'red' has lora_bias=True, so that it adds more"),
    ({"router_type": "closed_form"}, r"no expert is routed yet \(red, green, blue\); teach one first"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_base(tie_word_embeddings=False).save_pretrained(folder)
    return folder


def made(folder: Path, **settings: Any) -> DyLoraMoE:
    settings = {"target_modules": ["q_proj"], **settings}
    return DyLoraMoE(AutoModelForCausalLM.from_pretrained(folder), tiny_config(**settings)).eval()


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_mixture_that_the_plugin_cannot_route(folder, tmp_path, settings, message):
    model = made(folder, **settings)
    with pytest.raises(ValueError, match=message):
        model.export_vllm(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_policy_of_somebody_elses(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(POLICIES, "odd", softmax_of_best)
    with pytest.raises(ValueError, match="policy='odd': the plugin knows top_k only"):
        made(folder, policy="odd").export_vllm(tmp_path / "out")


def test_a_resized_base(folder, tmp_path):
    model = made(folder)
    model.resize_token_embeddings(70)
    with pytest.raises(ValueError, match=r"has 70 rows in its embeddings, .* have 61\. Save the resized base"):
        model.export_vllm(tmp_path / "out")
    with pytest.raises(ValueError, match=r"resized to 70 rows.*--to merged"):
        model.export_vllm_lora(tmp_path / "out")


@pytest.mark.parametrize(
    ("written", "held", "message"),
    [
        ({"quant_method": "bitsandbytes"}, True, r"quantized with 'bitsandbytes'.*in floating point"),
        ({}, True, r"quantized with None"),
        (None, True, r"was quantized while it was loaded.*without quantization"),
        ({"quant_method": "gptq"}, True, None),
    ],
)
def test_a_quantized_base(folder, tmp_path, written, held, message):
    model = made(folder)
    file = tmp_path / "base" / "config.json"
    file.parent.mkdir()
    config = json.loads((folder / "config.json").read_text())
    file.write_text(json.dumps(config | ({} if written is None else {"quantization_config": written})))
    (file.parent / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    model.get_base_model().name_or_path = str(file.parent)
    model.get_base_model().config.quantization_config = {"quant_method": "any"}
    if message is None:
        model.export_vllm(tmp_path / "out")
        return
    with pytest.raises(ValueError, match=message):
        model.export_vllm(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_no_text_model(folder, tmp_path):
    model = made(folder)
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["LlavaForConditionalGeneration"]}))
    (base / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    model.get_base_model().name_or_path = str(base)
    with pytest.raises(ValueError, match=r"'LlavaForConditionalGeneration', and the plugin routes text models only"):
        model.export_vllm(tmp_path / "out")


def test_one_expert_with_biases_is_named(tmp_path):
    experts = {
        "red": LoraConfig(r=2, target_modules=["q_proj"]),
        "blue": LoraConfig(r=1, target_modules=["v_proj"], lora_bias=True),
    }
    with pytest.raises(ValueError, match="expert 'blue' has lora_bias=True"):
        tiny_mixture(experts=experts, router_layer=0).export_vllm(tmp_path / "out")
