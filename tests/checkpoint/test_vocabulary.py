"""A base whose vocabulary was resized after loading: the mixture comes back with it, or is refused with the remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from dylora_moe import CheckpointError, DyLoraMoE
from dylora_moe.checkpoint.mixture import saved_experts
from stock import assert_same_tensors, logits
from tiny import VOCAB, tiny_base, tiny_mixture

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = VOCAB + 6
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
IDS = torch.tensor([[5, ROWS - 1, 7, VOCAB, 8]])


def resized(folder: Path, architecture: str = "llama", rows: int = ROWS, **config: Any) -> Any:
    """A base that lies in `folder` with 61 rows, loaded and resized."""
    if not folder.exists() and architecture == "phi":  # its head has a bias
        PhiForCausalLM(PhiConfig(vocab_size=VOCAB, **SMALL)).save_pretrained(folder)
    elif not folder.exists():
        tiny_base(architecture, **config).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    base.resize_token_embeddings(rows, mean_resizing=False)
    return base


@pytest.mark.parametrize(
    ("architecture", "tied", "keys"),
    [
        ("llama", False, ["input.weight", "output.weight"]),
        ("llama", True, ["input.weight"]),
        ("gpt2", True, ["input.weight"]),
        ("phi", False, ["input.weight", "output.bias", "output.weight"]),
    ],
)
def test_new_rows_travel_with_the_checkpoint(architecture, tied, keys, tmp_path):
    base = resized(tmp_path / "base", architecture, tie_word_embeddings=tied)
    targets = {"target_modules": ["c_attn"]} if architecture == "gpt2" else {"target_modules": ["q_proj"]}
    model = tiny_mixture(base=base, **targets)
    for parameter in base.get_output_embeddings().parameters():
        parameter.data[-6:] += 0.5
    model.save_pretrained(tmp_path / "mixture")
    fields = json.loads((tmp_path / "mixture" / "moe_config.json").read_text())
    assert (fields["format_version"], fields["vocabulary_rows"], fields["base_vocabulary_rows"]) == (2, ROWS, VOCAB)
    rows = load_file(tmp_path / "mixture" / "vocabulary.safetensors")
    assert sorted(rows) == keys
    assert {len(tensor) for tensor in rows.values()} == {6}
    expected = logits(model, IDS)
    by_name = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"))
    assert torch.equal(logits(by_name, IDS), expected)
    assert_same_tensors(by_name.state_dict(), model.state_dict())
    other_rows = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=resized(tmp_path / "base"))
    assert torch.equal(logits(other_rows, IDS), expected)
    by_name.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "vocabulary.safetensors")
    assert_same_tensors(again, rows)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_experts_on_the_embeddings_of_a_resized_base(targets, tmp_path):
    model = tiny_mixture(base=resized(tmp_path / "base"), target_modules=targets)
    model.save_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(DyLoraMoE.from_pretrained(str(tmp_path / "mixture")), IDS), logits(model, IDS))
    small = tiny_base()
    with pytest.raises(CheckpointError, match=rf"resize_token_embeddings\({ROWS}\)"):
        DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=small)


def test_a_base_of_another_size_is_refused_with_the_remedy(tmp_path):
    tiny_mixture(base=resized(tmp_path / "base")).save_pretrained(tmp_path / "mixture")
    for base in (tiny_base(), resized(tmp_path / "base", rows=ROWS + 1)):
        message = (
            rf"moe_config.json: .* {ROWS} rows .*{VOCAB} of .*base, which was resized.*has {len(base.lm_head.weight)}"
        )
        with pytest.raises(CheckpointError, match=message) as caught:
            DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=base)
        assert f"call base.resize_token_embeddings({ROWS}) first" in str(caught.value)


def test_a_resized_base_under_a_mixture_of_the_original_is_refused(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = tiny_mixture(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "mixture")
    fields = json.loads((tmp_path / "mixture" / "moe_config.json").read_text())
    assert (fields["format_version"], fields["vocabulary_rows"]) == (1, VOCAB)
    assert "base_vocabulary_rows" not in fields
    assert not (tmp_path / "mixture" / "vocabulary.safetensors").exists()
    with pytest.raises(CheckpointError, match=rf"had {VOCAB} rows in its embeddings; this base has {ROWS}: call base"):
        DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=resized(tmp_path / "base"))


def test_a_smaller_vocabulary_comes_back(tmp_path):
    model = tiny_mixture(base=resized(tmp_path / "base", rows=50))
    model.save_pretrained(tmp_path / "mixture")
    assert not (tmp_path / "mixture" / "vocabulary.safetensors").exists()
    ids = IDS % 50
    assert torch.equal(logits(DyLoraMoE.from_pretrained(str(tmp_path / "mixture")), ids), logits(model, ids))


def test_a_checkpoint_of_before_rows_were_recorded_loads(tmp_path):
    model = tiny_mixture()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "moe_config.json").read_text())
    del fields["vocabulary_rows"]
    (tmp_path / "moe_config.json").write_text(json.dumps(fields))
    assert torch.equal(
        logits(DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base()), IDS % 50), logits(model, IDS % 50)
    )


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_rows_are_refused(damage, tmp_path):
    tiny_mixture(base=resized(tmp_path / "base")).save_pretrained(tmp_path / "mixture")
    file = tmp_path / "mixture" / "vocabulary.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        fields = json.loads((tmp_path / "mixture" / "moe_config.json").read_text())
        text = json.dumps({**fields, "base_vocabulary_rows": VOCAB - 1})
        (tmp_path / "mixture" / "moe_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=resized(tmp_path / "base"))


def test_rows_are_owned_by_the_checkpoint(tmp_path):
    tiny_mixture(base=resized(tmp_path / "base")).save_pretrained(tmp_path / "mixture")
    tiny_mixture().save_pretrained(tmp_path / "mixture")
    assert not (tmp_path / "mixture" / "vocabulary.safetensors").exists()
    assert saved_experts(tmp_path / "mixture") == {"red", "green", "blue"}


def test_gathered_tensors_hold_the_rows(tmp_path):
    model = tiny_mixture(base=resized(tmp_path / "base"))
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", state_dict={k: v * 2 for k, v in model.gathered().items()})
    model.save_pretrained(tmp_path / "c", state_dict=model.state_dict())
    a, b, c = (load_file(tmp_path / name / "vocabulary.safetensors") for name in "abc")
    assert_same_tensors(b, {key: value * 2 for key, value in a.items()})
    assert_same_tensors(c, a)


def test_resizing_a_mixture(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = tiny_mixture(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    assert not any(p.requires_grad for p in model.get_base_model().get_input_embeddings().parameters())
    model.save_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(DyLoraMoE.from_pretrained(str(tmp_path / "mixture")), IDS), logits(model, IDS))
    on_head = tiny_mixture(target_modules=["lm_head"])
    with pytest.raises(ValueError, match="call it on the base before the mixture is made"):
        on_head.resize_token_embeddings(ROWS)
    assert on_head.get_input_embeddings().weight.shape[0] == VOCAB


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "q_proj"]])
def test_exports_carry_the_embeddings_as_stock_peft_writes_them(targets, tmp_path):
    model = tiny_mixture(base=resized(tmp_path / "base"), target_modules=targets)
    model.export_expert("red", tmp_path / "red")
    stock = get_peft_model(resized(tmp_path / "base"), LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    stock.save_pretrained(tmp_path / "stock")
    written = set(load_file(tmp_path / "red" / "adapter_model.safetensors"))
    assert written >= {key for key in load_file(tmp_path / "stock" / "adapter_model.safetensors") if "lora" not in key}
    assert len(written) == len(model.expert_tensors("red")) + 2  # stock PEFT forgets the head beside adapted embeddings
    again = PeftModel.from_pretrained(resized(tmp_path / "base"), str(tmp_path / "red")).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS, experts="red"))
    model.add_expert("guest", tmp_path / "red")
    assert torch.equal(logits(model, IDS, experts="guest"), logits(model, IDS, experts="red"))
    with pytest.raises(CheckpointError, match=rf"has {ROWS} rows, this base {VOCAB}.*resize_token_embeddings"):
        DyLoraMoE.from_adapters(tiny_base(), {"red": str(tmp_path / "red")})
