"""Composing: adapters and texts become a mixture that routes; what is wrong is said before anything runs."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dylora_moe import DyLoraMoE
from dylora_moe.cli import app
from dylora_moe.composition import Ingredient, base_of, compose, read_texts
from dylora_moe.data.examples import Example, encode_prompt
from tinybase import save_tiny_base, tiny_base, tiny_tokenizer
from topics import NAMES, texts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
THREE = NAMES[:3]


def write_texts(file, topic: int, count: int) -> None:
    rows = [row if isinstance(row, dict) else {"prompt": row, "completion": row} for row in texts(topic, count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_adapter(folder, base: str) -> str:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_base(), config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def parts(tmp_path):
    """The words for three experts on the command line."""
    base = save_tiny_base(tmp_path / "base")
    for topic, name in enumerate(THREE):
        write_adapter(tmp_path / name, base)
        write_texts(tmp_path / f"{name}.jsonl", topic, 6)
    return [f"{name}={tmp_path / name}:{tmp_path / name}.jsonl" for name in THREE]


def run(out, parts, *further):
    words = [word for part in parts for word in ("--expert", part)]
    return CliRunner().invoke(app, ["compose", str(out), *words, *further], catch_exceptions=False)


def test_the_command_writes_a_mixture_that_routes(tmp_path, parts):
    result = run(tmp_path / "out", parts)
    assert result.exit_code == 0
    assert "left out" in result.output
    assert "dylora-moe generate" in result.output
    assert "1.25 passes of the base per step, sequence granularity" in result.output  # the adapters sit below k = 1
    model = DyLoraMoE.from_pretrained(str(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()
    assert model.frozen_experts == set(THREE)
    assert all("sha256:" in model.skills[name].taught[0].source for name in THREE)
    right = 0
    for topic, name in enumerate(THREE):
        for row in texts(topic, 20, seed=5):
            if isinstance(row, dict):
                ids = torch.tensor([encode_prompt(Example(row["prompt"], ""), tiny_tokenizer())])
                with torch.no_grad():
                    right += model.expert_names[int(model(ids).routing_weights[0, 0].argmax())] == name
    assert right >= 36  # of 42
    answer = CliRunner().invoke(app, ["generate", str(tmp_path / "out"), "abba", "--max-new-tokens", "3"])
    assert answer.exit_code == 0


def test_two_experts_with_the_same_texts_are_named(tmp_path, parts):
    write_texts(tmp_path / "law.jsonl", THREE.index("sql"), 6)
    result = run(tmp_path / "out", parts)
    assert "law and sql are the same as far as their rows tell" in " ".join(result.output.split())


def test_every_expert_is_its_adapter(tmp_path, parts):
    ingredients = [Ingredient.parse(part) for part in parts]
    made = compose(tmp_path / "out", ingredients, read_texts(ingredients))
    alone = DyLoraMoE.from_adapters(tiny_base(), {"sql": str(tmp_path / "sql")})
    for one, other in zip(made.expert_tensors("sql"), alone.expert_tensors("sql"), strict=True):
        assert torch.equal(one.tensor, other.tensor)


def test_the_same_by_hand(tmp_path, parts):
    """In Python: from_adapters, then teach."""
    from dylora_moe import MoELoraConfig

    ingredients = [Ingredient.parse(part) for part in parts]
    rows = read_texts(ingredients)
    made = compose(tmp_path / "out", ingredients, rows)
    config = MoELoraConfig(router_type="closed_form", granularity="sequence", target_modules="all-linear")
    by_hand = DyLoraMoE.from_adapters(
        str(tmp_path / "base"), {each.name: each.adapter for each in ingredients}, config
    ).eval()
    for name in reversed(THREE):
        by_hand.teach(name, [{"prompt": row.prompt, "completion": row.completion} for row in rows[name]])
    for key, tensor in made.router.state_dict().items():
        assert torch.equal(by_hand.router.state_dict()[key], tensor), key


def test_few_texts_warn(tmp_path, caplog):
    write_texts(tmp_path / "few.jsonl", 0, 4)
    with caplog.at_level(logging.WARNING):
        read_texts([Ingredient("sql", "x", tmp_path / "few.jsonl")])
    assert "4 texts for 'sql'; with fewer than 5" in caplog.text


@pytest.mark.parametrize("text", ["", "sql", "sql=adapter", "=adapter:texts.jsonl", "sql=:texts.jsonl", "sql=adapter:"])
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match="expected NAME=ADAPTER:TEXTS"):
        Ingredient.parse(text)


def test_the_last_colon_parts_adapter_and_texts():
    found = Ingredient.parse("sql=C:/adapters/sql:texts.jsonl")
    assert (found.name, found.adapter, str(found.texts)) == ("sql", "C:/adapters/sql", "texts.jsonl")


def test_what_is_missing_is_named(tmp_path, parts):
    ingredients = [Ingredient.parse(part) for part in parts]
    with pytest.raises(ValueError, match=r"no file '.*gone.jsonl' with texts for 'sql'"):
        read_texts([Ingredient("sql", "x", tmp_path / "gone.jsonl")])
    with pytest.raises(ValueError, match="exists already"):
        read_texts([ingredients[0], ingredients[0]])
    with pytest.raises(ValueError, match="'base' is reserved"):
        read_texts([Ingredient("base", "x", ingredients[0].texts)])
    with pytest.raises(ValueError, match="nothing to compose"):
        compose(tmp_path / "out", [], {})
    config = tmp_path / "law/adapter_config.json"
    whole = config.read_text()
    config.write_text(whole.replace(str(tmp_path / "base"), "me/other"))
    with pytest.raises(ValueError, match=r"name different bases .*law: me/other.* --base"):
        base_of(ingredients)
    for name in THREE:
        (tmp_path / name / "adapter_config.json").write_text(whole.replace(f'"{tmp_path / "base"}"', "null"))
    with pytest.raises(ValueError, match=r"name no base; .* --base"):
        base_of(ingredients)
    with pytest.raises(ValueError, match=r"--base is .*nowhere, which cannot be loaded"):
        compose(tmp_path / "out", ingredients, read_texts(ingredients), base=str(tmp_path / "nowhere"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"README.md is in the way"):
        compose(tmp_path / "out", ingredients, read_texts(ingredients), base=str(tmp_path / "base"))
    (tmp_path / "out" / "README.md").unlink()
    assert run(tmp_path / "out", parts, "--base", str(tmp_path / "base")).exit_code == 0
    with pytest.raises(ValueError, match="holds a mixture already"):
        compose(tmp_path / "out", ingredients, read_texts(ingredients), base=str(tmp_path / "base"))


def test_help_says_what_the_separator_is():
    shown = CliRunner().invoke(app, ["compose", "--help"], env={"COLUMNS": "200"}).output
    assert "[default: (a new line)]" in shown


def test_separator_and_layer_are_heeded(tmp_path, parts):
    result = run(tmp_path / "out", parts, "--separator", r"\n\n", "--router-layer", "0")
    assert result.exit_code == 0
    model = DyLoraMoE.from_pretrained(str(tmp_path / "out"))
    assert model.skills.reading is not None
    assert model.skills.reading.separator == "\n\n"
    assert model.router_layer == 0
    assert model.passes_per_step == 1.0
