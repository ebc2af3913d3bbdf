"""The folder for vLLM, read back from its files alone by `reference.py`, is the mixture that was exported."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe import DyLoraMoE
from dylora_moe.checkpoint.files import CheckpointError
from dylora_moe.exporting import base_files, routed
from exporting.reference import Folder
from tiny import ATTENTION_INPUT, NAMES, difference, tiny_base, tiny_config, tiny_mixture, tokens
from tinybase import tiny_tokenizer
from topics import texts

MIXED = {"red": (2, 3, False), "green": (5, 4, True), "blue": (1, 1, False)}
"""Expert → rank, alpha, rsLoRA: experts that differ in everything that is exported."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny bases by architecture, with tokenizers."""
    found = {}
    for architecture in ("llama", "gpt2"):
        folder = tmp_path_factory.mktemp(architecture)
        tiny_base(architecture).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        found[architecture] = str(folder)
    return found


def mixed(architecture: str) -> dict[str, LoraConfig]:
    """Experts of different rank and scaling, each on modules of its own choice."""
    attention, other = ATTENTION_INPUT.get(architecture, "q_proj"), "c_fc" if architecture == "gpt2" else "down_proj"
    targets = {"red": [attention, other], "green": [attention], "blue": [other]}
    return {
        name: LoraConfig(
            r=r,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=rf".*\.(1|2|3)\..*({'|'.join(targets[name])})",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        for name, (r, alpha, rslora) in MIXED.items()
    }


def made(folder: str, architecture: str = "llama", **settings: Any) -> DyLoraMoE:
    """A mixture with mixed experts on the base in `folder`."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    return tiny_mixture(architecture, base=base, experts=mixed(architecture), **settings)


def assert_same(folder: Path, model: DyLoraMoE) -> None:
    """Routed, every row's weights and logits; forced, those of every selector."""
    read, ids = Folder(folder), tokens(2, 12)
    with torch.no_grad():
        expected = model(ids)
    for row in range(2):
        logits, weights = read.logits(ids[row])
        assert difference(weights, expected.routing_weights[row]) < 1e-5
        assert difference(logits, expected.logits[row]) < 1e-5
    for name in (*model.expert_names, "base"):
        weights = read.selector(name)
        assert weights.tolist() == read.section["selectors"][name]
        with torch.no_grad():
            forced = model(ids[:1], experts=name).logits[0]
        assert difference(read.logits(ids[0], weights.expand(ids.shape[1], -1))[0], forced) < 1e-5


ROUTING: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"top_k": 1, "granularity": "prefix"}),
    ("llama", {"top_k": 3, "temperature": 0.7}),
    ("llama", {"route_to_base": True, "router_type": "linear"}),
    ("gpt2", {"top_k": 2, "granularity": "prefix", "temperature": 1.5}),
    ("gpt2", {"route_to_base": True, "top_k": 4}),
]


@pytest.mark.parametrize(("architecture", "settings"), ROUTING, ids=str)
def test_weights_and_outputs_are_the_models(bases, tmp_path, architecture, settings):
    model = made(bases[architecture], architecture, **settings)
    model.export_vllm(tmp_path / "out")
    assert_same(tmp_path / "out", model)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["dylora_moe"]
    assert section["top_k"] == settings.get("top_k", 2)
    some = next(carried for carried in section["modules"].values() if [0, 2, 1.5] in carried)
    assert some in ([[0, 2, 1.5], [1, 5, 4 / 5**0.5]], [[0, 2, 1.5], [2, 1, 1.0]])


@pytest.mark.parametrize("granularity", ["token", "prefix"])
def test_a_router_in_closed_form_takes_the_temperature_of_its_granularity(bases, tmp_path, granularity):
    folder = tmp_path / "base"
    base = tiny_base("llama", vocab_size=257)
    base.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    base.name_or_path = str(folder)
    settings = {"router_type": "closed_form", "granularity": granularity, "router_layer": 1, "temperature": 0.8}
    model = DyLoraMoE(base, tiny_config(target_modules=["q_proj"], **settings), base_name=str(folder)).eval()
    for topic, name in enumerate(NAMES[:2]):
        model.teach(name, texts(topic, 6), tiny_tokenizer())
    assert len(set(model.router.get_parameter("temperature").tolist())) == 2
    model.export_vllm(tmp_path / "out")
    assert_same(tmp_path / "out", model)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["dylora_moe"]
    assert section["closed"] == [2]
    assert "router_hidden_size" not in section


def test_another_granularity_is_written_where_it_is_asked_for(bases, tmp_path):
    model = made(bases["llama"], granularity="sequence")
    with pytest.raises(ValueError, match=r'granularity="prefix".*--granularity prefix'):
        model.export_vllm(tmp_path / "out")
    model.export_vllm(tmp_path / "out", granularity="prefix")
    assert model.moe_config.granularity == "sequence"
    model.moe_config.granularity = "prefix"
    assert_same(tmp_path / "out", model)
    with pytest.raises(ValueError, match="granularity='word': choose one of token, prefix"):
        model.export_vllm(tmp_path / "other", granularity="word")


def test_a_new_expert_is_closed_and_can_be_forced(bases, tmp_path):
    model = made(bases["llama"])
    model.add_expert("late", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.export_vllm(tmp_path / "out")
    assert_same(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dylora_moe"]["closed"] == [3]


def test_fixed_mixtures_are_selectors(bases, tmp_path):
    model = made(bases["llama"])
    command = model.export_vllm(tmp_path / "out", {"half": {"blue": 0.5, "red": 0.25}})
    assert Folder(tmp_path / "out").selector("half").tolist() == [0.25, 0.0, 0.5]
    assert f"out:half={tmp_path}/out/selectors/half" in command
    assert "--max-loras 5 " in command
    assert "`out:half`" in (tmp_path / "out" / "README.md").read_text()
    config = PeftConfig.from_pretrained(str(tmp_path / "out" / "selectors" / "half"))
    assert (config.peft_type, config.target_modules) == ("LORA", {"dylora_select"})
    for mixtures, message in (
        ({"red": {"red": 1.0}}, "model 'red' exists already; the models are red, green, blue, base"),
        ({"base": {"red": 1.0}}, "model 'base' exists already"),
        ({"Red": {"red": 1.0}}, "model name 'Red': it differs from 'red' in capitals only"),
        ({"../evil": {"red": 1.0}}, "use a letter, then letters"),
        ({"half": {"pink": 1.0}}, "unknown expert 'pink'"),
        ({"half": {"red": float("nan")}}, "weight of 'red' is nan"),
        ({"half": {}}, "name at least one expert"),
    ):
        with pytest.raises(ValueError, match=message):
            model.export_vllm(tmp_path / "other", mixtures)
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------- files


def test_weights_are_linked_or_copied(bases, tmp_path, monkeypatch, caplog):
    model, weights = made(bases["llama"]), Path(bases["llama"]) / "model.safetensors"
    model.export_vllm(tmp_path / "linked")
    model.export_vllm(tmp_path / "copied", copy=True)
    assert (tmp_path / "linked" / "model.safetensors").samefile(weights)
    assert not (tmp_path / "copied" / "model.safetensors").samefile(weights)
    assert not caplog.records

    def elsewhere(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(base_files.os, "link", elsewhere)
    model.export_vllm(tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == weights.read_bytes()
    assert "weights are copied: no hard link to" in caplog.text


def test_a_base_in_several_files_has_ours_in_its_index(bases, tmp_path):
    base = tmp_path / "base"
    tiny_base("llama").save_pretrained(base, max_shard_size="8KB")
    (base / "consolidated.safetensors").write_bytes(b"what vLLM would read instead")
    model = made(str(base))
    model.export_vllm(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    assert len(set(places.values())) > 2
    for file in set(places.values()):
        assert set(load_file(tmp_path / "out" / file)) == {key for key, place in places.items() if place == file}
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    assert_same(tmp_path / "out", model)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "gone.safetensors", 7])
def test_a_hostile_index_is_refused(bases, tmp_path, name):
    base = tmp_path / "base"
    tiny_base("llama").save_pretrained(base, max_shard_size="8KB")
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    model = made(str(base))
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="as a file of weights"):
        model.export_vllm(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_checkpoints_tokenizer_wins(bases, tmp_path):
    model = made(bases["llama"])
    model.save_pretrained(tmp_path / "mixture")
    (Path(bases["llama"]) / "generation_config.json").write_text('{"temperature": 0.5}')
    DyLoraMoE.from_pretrained(str(tmp_path / "mixture")).export_vllm(tmp_path / "of_base")
    own = tiny_tokenizer()
    own.chat_template = "ours"
    own.save_pretrained(tmp_path / "mixture")
    DyLoraMoE.from_pretrained(str(tmp_path / "mixture")).export_vllm(tmp_path / "of_mixture")
    assert AutoTokenizer.from_pretrained(tmp_path / "of_base").chat_template is None
    assert AutoTokenizer.from_pretrained(tmp_path / "of_mixture").chat_template == "ours"
    for folder in ("of_base", "of_mixture"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text()) == {"temperature": 0.5}


def test_an_earlier_export_is_replaced_and_nothing_else(bases, tmp_path):
    model, out = made(bases["llama"]), tmp_path / "out"
    model.export_vllm(out, {"half": {"red": 0.5}})
    (out / "notes").write_text("mine")
    model.export_vllm(out)
    assert not (out / "selectors" / "half").exists()
    assert (out / "notes").read_text() == "mine"
    for other in ("mixture", "plain"):
        (tmp_path / other).mkdir()
    model.save_pretrained(tmp_path / "mixture")
    (tmp_path / "plain" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="holds a mixture already"):
        model.export_vllm(tmp_path / "mixture")
    with pytest.raises(ValueError, match="no earlier export for vLLM"):
        model.export_vllm(tmp_path / "plain")
    with pytest.raises(ValueError, match="no earlier export for vLLM"):
        model.export_vllm(bases["llama"])
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        model.export_vllm(tmp_path / "file")


def test_an_export_that_fails_leaves_the_older_one_whole(bases, tmp_path, monkeypatch):
    model, out = made(bases["llama"]), tmp_path / "out"
    model.export_vllm(out)
    before = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(routed, "write_selector", fails)
    with pytest.raises(OSError, match="disk full"):
        model.export_vllm(out, {"half": {"red": 0.5}})
    with pytest.raises(OSError, match="disk full"):
        model.export_vllm(tmp_path / "fresh")
    assert {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_odd_name_of_the_folder_does_not_break_the_command(bases, tmp_path):
    out = tmp_path / "a b=c,d"
    command = made(bases["llama"]).export_vllm(out)
    assert f"--model '{out}' --served-model-name 'a b=c,d'" in command
    assert json.dumps({"name": "a b=c,d:red", "path": f"{out}/selectors/red"}) in command


# ---------------------------------------------------------------------- what is refused


def test_values_that_are_not_finite_are_named(bases, tmp_path):
    model = made(bases["llama"])
    layer = next(layer for layer in model.routed_layers if "green" in layer.lora_B)
    layer.lora_B["green"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=rf"expert 'green': B of {layer.routing_name} holds values .* not finite"):
        model.export_vllm(tmp_path / "out")
    layer.lora_B["green"].weight.data = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"B of .* has shape \[3, 5\], expected \[16, 5\]"):
        model.export_vllm(tmp_path / "out")
    layer.lora_B["green"].weight.data = torch.zeros(16, 5)
    model.router.up.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the router's up holds values"):
        model.export_vllm(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_without_files_is_refused(bases, tmp_path):
    with pytest.raises(ValueError, match=r"has no name, is no folder .*base\.save_pretrained"):
        tiny_mixture().export_vllm(tmp_path / "out")
    model = made(bases["llama"])
    shutil.copytree(bases["llama"], tmp_path / "base")
    model.get_base_model().name_or_path = str(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no model.safetensors.*base\.save_pretrained"):
        model.export_vllm(tmp_path / "out")
    model.get_base_model().name_or_path = "nobody/nothing"
    with pytest.raises(ValueError, match="is no folder with files of weights"):
        model.export_vllm(tmp_path / "out")
