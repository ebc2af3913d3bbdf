"""A plain model with an expert in its weights, loaded by stock transformers, answers as the mixture forced to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe import DyLoraMoE
from dylora_moe.exporting import merged
from tiny import difference, tiny_base, tiny_config, tiny_mixture, tokens
from tinybase import tiny_tokenizer

WEIGHTS = {"red": 0.5, "blue": -0.25}


def logits(folder: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_is_forced(architecture, dtype, tmp_path):
    targets = {"gpt2": ["c_attn", "attn.c_proj"], "llama": ["q_proj", "down_proj"]}  # a square one among them
    model = tiny_mixture(architecture, dtype, target_modules=targets[architecture])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.export_merged("green", tmp_path / "green")
    model.export_merged(WEIGHTS, tmp_path / "half")
    with torch.no_grad():
        forced = model(tokens(), experts="green").logits
        half = model(tokens(), routing_weights=torch.tensor([0.5, 0.0, -0.25])).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.05  # the sum is rounded to bfloat16 once more
    assert difference(logits(tmp_path / "green"), forced) < tolerance
    assert difference(logits(tmp_path / "half"), half) < tolerance
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_the_folder_is_a_stock_model_with_its_tokenizer(tmp_path):
    base = tmp_path / "base"
    tiny_base().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model = DyLoraMoE.from_base(str(base), tiny_config(target_modules=["q_proj"])).eval()
    model.export_merged("red", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in base.iterdir()}
    found, expected = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", base))
    differing = [k for k, t in found.state_dict().items() if not torch.equal(t, expected.state_dict()[k])]
    assert differing == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (1, 2, 3)]
    assert found.config.to_dict() == {**expected.config.to_dict(), "_name_or_path": found.config._name_or_path}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()


def test_experts_on_head_and_embeddings(tmp_path):
    settings = {"target_modules": ["embed_tokens", "lm_head"], "router_layer": 0}
    model = DyLoraMoE(tiny_base(tie_word_embeddings=False), tiny_config(**settings)).eval()
    model.export_merged("red", tmp_path / "out")
    with torch.no_grad():
        assert difference(logits(tmp_path / "out"), model(tokens(), experts="red").logits) < 1e-5
    model = DyLoraMoE(tiny_base(tie_word_embeddings=True), tiny_config(**settings)).eval()
    with pytest.raises(ValueError, match=r"adapts model.embed_tokens, whose weight another module shares.*--to peft"):
        model.export_merged("red", tmp_path / "tied")
    assert not (tmp_path / "tied").exists()


def test_a_resized_base_is_written_whole(tmp_path):
    base = tmp_path / "base"
    tiny_base().save_pretrained(base)
    model = DyLoraMoE.from_base(str(base), tiny_config(target_modules=["q_proj"])).eval()
    model.resize_token_embeddings(70)
    model.export_merged("red", tmp_path / "out")
    with torch.no_grad():
        assert difference(logits(tmp_path / "out"), model(tokens(), experts="red").logits) < 1e-5


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_what_cannot_be_merged_is_refused(tmp_path, monkeypatch):
    for setting in ("use_dora", "lora_bias"):
        with pytest.raises(ValueError, match=rf"expert 'red' has {setting}=True.*--to peft"):
            tiny_mixture(**{setting: True}).export_merged("red", tmp_path / "out")
    model = tiny_mixture()
    with pytest.raises(ValueError, match="unknown expert 'pink'"):
        model.export_merged("pink", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown expert 'pink'"):
        model.export_merged({"pink": 0.5}, tmp_path / "out")
    weight = model.routed_layers[0].lora_B["blue"].weight.data
    weight[0, 0], kept = float("inf"), weight[0, 0].clone()
    with pytest.raises(ValueError, match=r"add to model\..* is not finite"):
        model.export_merged("blue", tmp_path / "out")
    weight[0, 0] = kept
    model.get_base_model().config.quantization_config = {"quant_method": "any"}
    with pytest.raises(ValueError, match="the base is quantized"):
        model.export_merged("red", tmp_path / "out")
    del model.get_base_model().config.quantization_config

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(merged, "copy_companions", fails)
    with pytest.raises(OSError, match="disk full"):
        model.export_merged("red", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is there already and not empty"):
        model.export_merged("red", tmp_path)
