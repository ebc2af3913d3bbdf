"""The command line as a new user meets it: train, generate, inspect, check, and messages instead of tracebacks."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig
from typer.testing import CliRunner

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.cli import app, console, errors, main
from dylora_moe.training.recipe.recipe import load_recipe
from dylora_moe.training.run.arguments import recipe_text
from dylora_moe.training.run.job import Job
from tinybase import save_tiny_base

runner = CliRunner()
TRAIN = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def recipe(tmp_path, base):
    """Write a recipe of two generated skills; keyword arguments replace its parts."""

    def write(**changes) -> str:
        content = {
            "base": {"model": base},
            "experts": {
                "date": {"data": {"skill": "date", "train": 8, "test": 2}},
                "cart": {"data": {"skill": "cart", "train": 8, "test": 2}, "lora": {"r": 6}},
            },
            "mixture": {"r": 4, "target_modules": "all-linear"},
            "train": TRAIN,
            "eval": {"max_new_tokens": 4, "batch_size": 2},
            "output": str(tmp_path / "out"),
            **changes,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(file)

    return write


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"domain_coefficient": 1.0, "router_learning_rate": 0.01},
        {"method": "staged", "expert_steps": 2, "router_steps": 1, "domain_coefficient": 1.0},
    ],
    ids=["joint", "joint with domains", "staged"],
)
def test_train_writes_checkpoint_and_results(recipe, base, tmp_path, method):
    train = {key: value for key, value in TRAIN.items() if not (method.get("method") and key == "max_steps")}
    result = runner.invoke(app, ["train", "--no-report", recipe(train={**train, **method})], catch_exceptions=False)
    assert result.exit_code == 0
    assert "identical answers" in result.output
    assert "dylora-moe generate" in result.output
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    for column in ("base", "mixture", "top1"):
        assert set(results[column]) == {"date", "cart"}
    assert results["reloaded_identical"] is True
    assert results["seconds"] > 0
    for row in results["load"].values():
        assert sum(row.values()) == pytest.approx(1, abs=1e-3)
    model = DyLoraMoE.from_pretrained(str(out))
    assert model.expert_names == ["date", "cart"]
    assert model.peft_config["cart"].r == 6
    assert all(t.tensor.requires_grad for name in model.expert_names for t in model.expert_tensors(name))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out / "date")).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, model(input_ids=ids, experts="date").logits)


def test_training_moves_experts_and_router_only(recipe, base, tmp_path):
    runner.invoke(app, ["train", "--no-report", recipe(), "--set", "train.learning_rate=0.01"], catch_exceptions=False)
    model = DyLoraMoE.from_pretrained(str(tmp_path / "out"))
    assert all(t.tensor.abs().sum() > 0 for t in model.expert_tensors("date") if ".lora_B." in t.key)
    fresh = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.unload().state_dict().items())


def test_loss_metric_on_jsonl_and_baseline(recipe, tmp_path):
    for name in ("train", "test"):
        lines = [json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = {"train": "train.jsonl", "test": "test.jsonl", "test_limit": 3}
    file = recipe(experts={"one": {"data": data}, "two": {"data": data}}, eval={"metric": "loss", "batch_size": 2})
    result = runner.invoke(app, ["train", file, "--baseline"], catch_exceptions=False)
    assert result.exit_code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["single"]) == {"one", "two"}
    assert 3 < results["base"]["one"] < 8  # a random model over 257 tokens: about log 257
    assert "Held-out loss" in result.output


def test_chats_text_and_prompts_from_several_formats_in_one_mixture(recipe, base, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    shutil.copytree(base, tmp_path / "chat-base")
    tokenizer.save_pretrained(tmp_path / "chat-base")
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}] * 2
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": turns}] * 3))
    (tmp_path / "prose.csv").write_text("text\n" + "once upon a time\n" * 4 + "x" * 300 + "\n")
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"q": f"q{i}", "a": "yes"}) for i in range(5)))
    files = {
        "chat": ("chat.json", {}),
        "prose": ("prose.csv", {}),
        "asked": ("asked.jsonl", {"prompt": "q", "completion": "a"}),
    }
    experts = {
        name: {"data": {"train": file, "test": file, "columns": columns, "weight": 2.0}}
        for name, (file, columns) in files.items()
    }
    train = {**TRAIN, "mixing": "temperature", "too_long": "drop", "completion_only_loss": False}
    path = recipe(
        base={"model": str(tmp_path / "chat-base"), "chat": True}, experts=experts, train=train, eval={"metric": "loss"}
    )
    with caplog.at_level("WARNING", "dylora_moe.data.examples"):
        result = runner.invoke(app, ["train", path], catch_exceptions=False)
    assert result.exit_code == 0
    for what in ("training", "held-out"):
        assert f"the {what} data of 'prose': 1 of 5 examples exceed 256 tokens (the longest has 301); dropped." in (
            caplog.messages
        )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(3 < results["mixture"][name] < 8 for name in experts)
    assert results["reloaded_identical"] is True


def test_generate_and_inspect(recipe, tmp_path):
    runner.invoke(app, ["train", "--no-report", recipe()], catch_exceptions=False)
    out = str(tmp_path / "out")
    plain = runner.invoke(app, ["generate", out, "When?", "--max-new-tokens", "4"], catch_exceptions=False)
    assert plain.exit_code == 0
    shown = runner.invoke(
        app, ["generate", out, "When?", "--max-new-tokens", "4", "--show-routing"], catch_exceptions=False
    )
    assert "Routing" in shown.output
    assert "date" in shown.output
    forced = runner.invoke(
        app, ["generate", out, "When?", "--max-new-tokens", "4", "--expert", "cart", "--show-routing"]
    )
    assert "100.0%" in forced.output
    lines = {line.split("  ")[0]: line for line in forced.output.splitlines()}  # says it without colours
    assert lines["'W'"].split() == ["'W'", "-"]
    assert lines["'?'"].split() == ["'?'", "cart", "1.00"]
    told = runner.invoke(app, ["generate", out, "When?", "--max-new-tokens", "4", "--expert", "cart", "--json"])
    answer = json.loads(told.stdout)
    assert answer["prompt_tokens"] == 5
    assert "".join(token["text"] for token in answer["tokens"]).startswith("When?")
    weights = [token["weights"] for token in answer["tokens"]]
    assert weights == [None] + [{"date": 0.0, "cart": 1.0}] * (len(weights) - 1)
    assert answer["load"] == {"date": 0.0, "cart": 1.0}
    folded = runner.invoke(app, ["generate", out, "When?", "--max-new-tokens", "4", "--expert", "cart", "--fold"])
    assert folded.stdout.strip() == answer["text"]
    with pytest.raises(ValueError, match="fold does not apply"):
        runner.invoke(app, ["generate", out, "When?", "--fold"], catch_exceptions=False)
    seen = runner.invoke(app, ["inspect", out, "--text", "Buy two apples"], catch_exceptions=False)
    for heading in ("Parameters", "Routing", "Gradients"):
        assert heading in seen.output
    assert "router" in seen.output
    assert "frozen" in seen.output


def test_the_next_commands_can_be_pasted(recipe, tmp_path, monkeypatch):
    """Into a shell, whatever is in the prompt and the path, and with a prompt from the training data at need."""
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "-x [it's] $HOME", "completion": "y"}
    (tmp_path / "d.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    path = recipe(experts={"one": {"data": {"train": "d.jsonl"}}}, output="my run")
    shown = runner.invoke(app, ["train", "--no-report", path], catch_exceptions=False).stdout
    first, second, third = shown[shown.index("Next:") :].splitlines()[1:4]
    words = ["dylora-moe", "generate", "--show-routing", "--", "my run", "-x [it's] $HOME"]
    assert shlex.split(first) == words
    assert shlex.split(second) == ["dylora-moe", "inspect", "my run"]
    assert shlex.split(third) == ["dylora-moe", "serve", "my run"]
    done = runner.invoke(app, [*words[1:3], "--max-new-tokens", "1", *words[3:]], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads((tmp_path / "my run" / "moe_config.json").read_text())["chat"] is False


def test_recipe_check_prints_the_defaults(recipe):
    result = runner.invoke(app, ["recipe", "check", recipe()], catch_exceptions=False)
    resolved = yaml.safe_load(result.stdout)
    assert resolved["train"]["mixing"] == "proportional"
    assert "Base: " in result.stderr


def test_recipe_check_hides_no_value_that_a_run_uses(recipe, tmp_path):
    """All fields in which the trainer's arguments differ from a bare SFTConfig, but for the run's own paths."""
    path = recipe()
    printed = runner.invoke(app, ["recipe", "check", path], catch_exceptions=False).stdout
    shown = yaml.safe_load(printed)["train"]
    job = Job(load_recipe(path), Console(quiet=True))
    job.read_data()
    ours, bare = job.arguments(job.stages[0]), SFTConfig(output_dir=str(tmp_path), bf16=False)
    differing = {f.name for f in fields(ours) if getattr(ours, f.name, None) != getattr(bare, f.name, None)}
    assert {"learning_rate", "save_steps", "max_length"} <= differing
    if "activation_checkpointing" in shown:  # of which it is the older name
        differing.discard("gradient_checkpointing")
    assert differing - {"output_dir", "logging_dir", "run_name", "use_cpu", "seed"} <= set(shown)
    assert ("train.use_cpu: true" in printed) == ours.use_cpu
    assert shown["learning_rate"] == ours.learning_rate
    assert shown["bf16"] is False
    (tmp_path / "resolved.yaml").write_text(printed)
    again = runner.invoke(app, ["recipe", "check", str(tmp_path / "resolved.yaml")], catch_exceptions=False)
    assert again.stdout == printed


def test_recipe_check_prints_yaml_to_the_byte(recipe):
    text = ":smile: [bold]a\tb " + "long " * 60
    changed = {"one": {"data": {"skill": "date", "train": 4, "test": 1}, "lora": {}}}
    path = recipe(experts=changed, output=text)
    result = runner.invoke(app, ["recipe", "check", path], catch_exceptions=False)
    assert result.stdout == recipe_text(load_recipe(path), 256)
    assert yaml.safe_load(result.stdout)["output"] == text


@pytest.mark.parametrize("shown", [console, errors])
def test_emoji_codes_are_left_alone(shown):
    with shown.capture() as captured:
        shown.print(":smile:")
    assert captured.get() == ":smile:\n"


def test_empty_and_broken_data_leave_no_output(recipe, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 400, "completion": "b"}))
    for file, message in ((broken, "line 2"), (empty, "no examples"), (long, "exceed 256 tokens")):
        path = recipe(experts={"one": {"data": {"train": str(file)}}})
        with pytest.raises(ValueError, match=message):
            runner.invoke(app, ["train", path], catch_exceptions=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.yaml"], "cannot read the recipe"),
        (["generate", "no-such-folder", "hello"], "no such folder"),
        (["train", "{recipe}", "--set", "train.lerning_rate=1"], "learning_rate"),
        (["train", "{recipe}", "--set", "mixture.top_k=9"], "top_k=9"),
        (["train", "{recipe}", "--output", ""], "output: empty"),
        (["train", "{recipe}", "--jobs", "2"], "--jobs 2 trains the experts of `method: staged`"),
        (["recipe", "check", "{recipe}", "--set", "train.optim=foo"], "foo"),
        (["recipe", "check", "{recipe}", "--set", "base.model=no/where"], "base.model: no/where is no folder here"),
    ],
)
def test_mistakes_are_one_message(recipe, arguments, message, monkeypatch, capsys):
    path = recipe()
    monkeypatch.setattr(sys, "argv", ["dylora-moe", *(a.replace("{recipe}", path) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", [["generate", "hello"], ["inspect"]])
def test_a_base_that_has_moved_is_named_with_the_remedy(command, tmp_path, monkeypatch, capsys):
    name = save_tiny_base(tmp_path / "base")
    config = MoELoraConfig(expert_names=["law"], r=2, target_modules=["q_proj"])
    DyLoraMoE.from_base(name, config).save_pretrained(tmp_path / "mixture")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["dylora-moe", command[0], str(tmp_path / "mixture"), *command[1:]])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"names the base {name}, which cannot be loaded" in error
    assert "--base" in error


def test_module_entry_point_fails_without_a_traceback():
    command = [sys.executable, "-m", "dylora_moe", "train", "missing.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot read the recipe" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["2024", "a: b"])
def test_output_is_taken_as_it_is(recipe, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    runner.invoke(app, ["train", "--no-report", recipe(), "--output", name], catch_exceptions=False)
    assert (tmp_path / name / "results.json").is_file()


def test_unknown_expert_is_named(recipe, tmp_path):
    runner.invoke(app, ["train", "--no-report", recipe()], catch_exceptions=False)
    with pytest.raises(ValueError, match=r"unknown expert 'law'; the experts are date, cart"):
        runner.invoke(app, ["generate", str(tmp_path / "out"), "x", "--expert", "law"], catch_exceptions=False)


def test_help_teaches():
    for command in (["--help"], ["train", "--help"], ["generate", "--help"], ["inspect", "--help"]):
        assert "dylora-moe" in runner.invoke(app, command).output or "Usage" in runner.invoke(app, command).output
    assert "train.max_steps=5" in runner.invoke(app, ["train", "--help"]).output
