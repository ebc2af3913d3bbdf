"""`dylora-moe export`: what it writes and says, and what it refuses before a base is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dylora_moe import DyLoraMoE, MoELoraConfig, keeping
from dylora_moe.cli import app
from exporting.reference import Folder
from tiny import difference
from tinybase import save_tiny_base, tiny_base, tiny_tokenizer


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    base = save_tiny_base(folder / "base")
    config = MoELoraConfig(
        expert_names=["sql", "math"], init_lora_weights=False, target_modules=["q_proj"], r=2, granularity="sequence"
    )
    DyLoraMoE.from_base(base, config).save_pretrained(folder / "mixture")
    tiny_tokenizer().save_pretrained(folder / "mixture")
    return folder / "mixture"


@pytest.fixture(autouse=True)
def _wide(monkeypatch) -> None:
    monkeypatch.setattr(keeping, "console", Console(width=400, emoji=False))


def run(*words) -> str:
    result = CliRunner().invoke(app, ["export", *(str(word) for word in words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def ids() -> torch.Tensor:
    return torch.tensor([tiny_tokenizer()("abcabbdddefi").input_ids])


def test_for_vllm_routed(mixture, tmp_path):
    shown = run(
        mixture, tmp_path / "out", "--to", "vllm", "--granularity", "prefix", "--mixture", "half=sql:0.5,math:.5"
    )
    assert f"For vLLM: {tmp_path / 'out'}" in shown
    assert f"--model {tmp_path / 'out'} --served-model-name out" in shown
    section = json.loads((tmp_path / "out" / "config.json").read_text())["dylora_moe"]
    assert section["granularity"] == "prefix"
    assert section["selectors"]["half"] == [0.5, 0.5]
    model = DyLoraMoE.from_pretrained(str(mixture))
    model.moe_config.granularity = "prefix"
    with torch.no_grad():
        assert difference(Folder(tmp_path / "out").logits(ids()[0])[0], model(ids()).logits[0]) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()
    run(mixture, tmp_path / "out", "--to", "vllm", "--granularity", "token", "--copy")
    assert not (tmp_path / "out/selectors/half").exists()
    assert (tmp_path / "out/model.safetensors").stat().st_nlink == 1


def test_for_vllm_as_adapters(mixture, tmp_path):
    shown = run(
        mixture, tmp_path / "out", "--to", "vllm-lora", "--mixture", "half=sql:0.5,math:.5", "--mixture", "b=sql:2"
    )
    assert f"vllm serve {mixture.parent / 'base'} \\" in shown
    assert "--max-loras 4 --max-lora-rank 8" in shown
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"sql", "math", "half", "b", "README.md"}


def test_as_a_plain_model_or_an_adapter(mixture, tmp_path):
    model = DyLoraMoE.from_pretrained(str(mixture))
    run(mixture, "math", tmp_path / "math", "--to", "merged")
    run(mixture, tmp_path / "half", "--to", "merged", "--mixture", "half=sql:0.5,math:.5")
    run(mixture, tmp_path / "adapter", "--mixture", "half=sql:0.5,math:.5")
    assert f"Adapter: {tmp_path / 'sql'}" in run(mixture, "sql", tmp_path / "sql")
    with torch.no_grad():
        half = model(ids(), routing_weights=torch.tensor([0.5, 0.5])).logits
        for folder, expected in (("math", model(ids(), experts="math").logits), ("half", half)):
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
            assert difference(plain(ids()).logits, expected) < 1e-5
        for folder, expected in (("sql", model(ids(), experts="sql").logits), ("adapter", half)):
            stock = PeftModel.from_pretrained(tiny_base(), str(tmp_path / folder))
            assert difference(stock(ids()).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sql", "OUT", "--to", "vllm"], "--to vllm writes all experts: leave 'sql' out"),
        (["sql", "OUT", "--to", "vllm-lora"], "--to vllm-lora writes all experts: leave 'sql' out"),
        (["OUT"], "--to peft writes one expert or one fixed mixture: dylora-moe export "),
        (["OUT", "--to", "merged"], "--to merged writes one expert or one fixed mixture"),
        (["sql", "OUT", "--mixture", "half=sql:0.5"], "one --mixture and no NAME"),
        (["OUT", "--mixture", "a=sql:1", "--mixture", "b=sql:1"], "writes one expert or one fixed mixture"),
        (["sql", "OUT", "--copy"], "--copy goes with --to vllm; leave it out"),
        (["OUT", "--to", "vllm-lora", "--granularity", "prefix"], "--granularity goes with --to vllm"),
        (["sql", "math", "OUT"], "an expert's name and a folder are taken, or a folder alone"),
        (["OUT", "--mixture", "sql:0.5"], r"--mixture 'sql:0.5': a name of its own.* half=sql:0.5,math:0.5"),
        (["OUT", "--mixture", "half=sql"], "--mixture 'half=sql': a name of its own"),
        (["OUT", "--mixture", "half="], "--mixture 'half='"),
        (["OUT", "--mixture", "=sql:1"], "--mixture '=sql:1'"),
        (["OUT", "--mixture", "half=sql:1,sql:2"], "each expert once"),
        (["OUT", "--to", "vllm-lora", "--mixture", "a=sql:1", "--mixture", "a=math:1"], "a name of its own"),
        (["sql", "DIR"], "holds a mixture already"),
        (["DIR", "--to", "vllm"], "holds a mixture already"),
        (["DIR/sql", "--to", "vllm-lora"], "is there already and not empty"),
        (["sql", "DIR/math"], "is an expert's folder of the mixture"),
    ],
)
def test_what_is_refused_before_the_base_is_loaded(mixture, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("dylora_moe.exporting.command.session_on", None)  # a call of it would be a TypeError
    before = sorted(mixture.rglob("*"))
    words = [word.replace("OUT", str(tmp_path / "out")).replace("DIR", str(mixture)) for word in words]
    with pytest.raises(ValueError, match=message):
        run(mixture, *words)
    assert sorted(mixture.rglob("*")) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "vllm"], "--granularity prefix"),
        (["--to", "vllm-lora", "--mixture", "half=sql:nan"], "weight of 'sql' is nan"),
        (["--to", "merged", "--mixture", "half=pink:1"], "unknown expert 'pink'"),
        (["--to", "vllm", "--granularity", "prefix", "--mixture", "../x=sql:1"], r"model name '\.\./x': use a letter"),
    ],
)
def test_what_is_refused_of_the_mixture(mixture, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(mixture, tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []
