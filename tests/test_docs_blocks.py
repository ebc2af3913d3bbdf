"""Every command and every block of Python in README and docs does what it says, on a tiny base without network.

A page's blocks run in order, in one namespace and one folder, in which lies what readers are said to have.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from datasets import Dataset
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]
from typer.testing import CliRunner

from dylora_moe import DyLoraMoE
from dylora_moe.cli import app
from dylora_moe.report import page
from dylora_moe.skills.background import background_texts
from pages import (
    ADDRESS,
    FENCE,
    PAGES,
    ROOT,
    background,
    blocks,
    furnish,
    furnish_adapters,
    furnish_recipes,
)
from tinybase import save_tiny_base

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOT_RUN = {
    "from transformers import AutoModelForCausalLM, BitsAndBytesConfig": "needs bitsandbytes",
    "import lm_eval": "needs lm-eval and the hub",
    'model.push_to_hub("me/skills", private=True)': "needs the hub",
    "dylora-moe --install-completion": "changes the user's shell",
    "dylora-moe gateway": "needs an engine",
    "dylora-moe bench --plan generation": "takes minutes",
    "dylora-moe bench --plan training": "takes minutes",
    "dylora-moe bench --plan gpu-prefill": "needs a GPU",
    "dylora-moe bench --work train": "takes minutes",
    "benchmarks/gpu.sh": "needs a GPU",
    "docker": "needs Docker",
    "make": "the targets are checked",
    "pip install": "the extras are checked",
    "vllm serve": "needs vLLM",
}
"""How a block of Python or a command begins → why it is checked for its names and arguments only."""
SERVING = ROOT / "docs" / "serving.md"
"""Its commands and its Python go together, with a server beside them."""
ELSEWHERE = {"bitsandbytes", "lm_eval"}
"""Modules that need not be installed."""


def not_run(text: str) -> str | None:
    """Why a block or command is not run, or None."""
    return next((reason for start, reason in NOT_RUN.items() if text.startswith(start)), None)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def test_every_block_is_of_a_kind_that_is_tried():
    """`test_docs.py` reads the recipes and rows."""
    for file in PAGES:
        text = file.read_text(encoding="utf-8")
        assert {language for language, _ in FENCE.findall(text)} <= {"bash", "python", "yaml", "json"}
        assert not re.search(r"^ {4}(dylora-moe|make|pip|\S+\.sh)", FENCE.sub("", text), re.MULTILINE), file.name


# ---------------------------------------------------------------------- Python


def given(page: str) -> dict[str, Any]:
    """The names that a page's prose stands for."""
    ids = torch.arange(1, 19).reshape(3, 6)
    if page == "README.md":
        return {"input_ids": ids, "mask": torch.ones_like(ids), "labels": ids}
    if page == "training.md":
        pairs = [{"prompt": "ask", "chosen": " yes", "rejected": " no"}]
        args = DPOConfig("runs/dpo", use_cpu=True, max_steps=1)
        model = DyLoraMoE.from_pretrained("runs/skills")
        return {
            "DyLoraMoE": DyLoraMoE,
            "DPOTrainer": DPOTrainer,
            "model": model,
            "args": args,
            "pairs": Dataset.from_list(pairs),
        }
    return {}


@pytest.mark.parametrize(
    "file", [file for file in PAGES if blocks(file, "python") and file != SERVING], ids=lambda file: file.stem
)
def test_python_runs(file, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path, base)
    names: dict[str, Any] = {"__name__": "page", **given(file.name)}
    for block in blocks(file, "python"):
        code = block.text.replace(HUB_ID, base)
        if not_run(block.text) is None:
            exec(compile(code, f"{file.name}: {block.key}", "exec"), names)
        else:
            check_names(code, names)


def check_names(code: str, names: dict[str, Any]) -> None:
    """Imports exist, and calls have no argument that the called does not take; what is not installed is passed over."""
    names = dict(names)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] not in ELSEWHERE:
            module = importlib.import_module(str(node.module))
            names |= {alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= ELSEWHERE
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            root = ast.unparse(node.func).partition(".")[0]
            if root in names:
                called = eval(ast.unparse(node.func), names)
                inspect.signature(called).bind_partial(**{k.arg: None for k in node.keywords if k.arg})


def test_an_argument_that_there_is_not_is_found():
    with pytest.raises(TypeError, match="r_"):
        check_names("from dylora_moe import MoELoraConfig\nMoELoraConfig(r_=4)", {})
    with pytest.raises(AttributeError, match="LoraMix"):
        check_names("from dylora_moe import LoraMix", {})


# ---------------------------------------------------------------------- commands


def commands(file: Path) -> list[str]:
    """The commands of a page's blocks, without comments."""
    return [command for block in blocks(file, "bash") for command in commands_of(block.text)]


def commands_of(text: str) -> list[str]:
    """Those of one block."""
    lines = text.replace("\\\n", "").splitlines()
    return [words for line in lines if (words := shlex.join(shlex.split(line, comments=True)))]


def inline_commands(file: Path) -> list[str]:
    """The commands within a page's sentences and tables."""
    return re.findall(r"`((?:dylora-moe|make|accelerate launch) [^`]+)`", file.read_text(encoding="utf-8"))


def check(command: str) -> None:
    """Raise or fail if a command, one of its options or a file that it starts is not there."""
    program, *words = shlex.split(command)
    if program == "dylora-moe":
        group: Any = typer.main.get_command(app)
        with group.make_context(program, list(words), resilient_parsing=words[0].startswith("--")) as context:
            if words[0].startswith("--"):
                assert words[0] in {option for parameter in group.get_params(context) for option in parameter.opts}
            else:
                name, chosen, rest = group.resolve_command(context, words)
                chosen.make_context(name, rest, resilient_parsing=not rest)  # prose may name it without its arguments
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets, command
    elif program == "accelerate":
        assert (ROOT / words[words.index("--config_file") + 1]).is_file(), command
        check(shlex.join(["dylora-moe", *words[words.index("dylora_moe") + 1 :]]))
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", command)))) <= extras.keys(), command
    elif program == "docker":
        arguments = re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        assert set(re.findall(r"--build-arg (\w+)=", command)) <= set(arguments), command
        if "dylora-moe serve" in command:
            check(command[command.index("dylora-moe serve") :])
    elif program not in ("curl", "vllm"):
        assert (ROOT / program).is_file(), command


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_commands_and_their_options_exist(file):
    for command in [*commands(file), *inline_commands(file)]:
        check(command)


@pytest.mark.parametrize(
    "command", ["dylora-moe train r.yaml --sett a=1", "dylora-moe trian r.yaml", "dylora-moe --instal", "make tests"]
)
def test_a_command_that_there_is_not_is_found(command):
    with pytest.raises(Exception, match=r"sett|trian|tests|instal"):
        check(command)


@pytest.mark.parametrize("draw", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_commands_run(draw, base, tmp_path, monkeypatch):
    """In one folder and the order of the pages: the others go on with what README's train.

    The figures of a report take ten seconds, and `tests/report` draws them, too.
    """
    monkeypatch.chdir(tmp_path)
    furnish_adapters(tmp_path, base)
    furnish_recipes(tmp_path, base)
    if not draw:
        monkeypatch.setattr(page, "write_report", lambda folder: folder / "report.html")
    with background(monkeypatch):
        for file in PAGES:
            for command in commands(file) if file != SERVING else ():
                if not_run(command) is None:
                    run(command.replace("train.max_steps=60", "train.max_steps=3"))


def run(command: str) -> None:
    """Run a command of ours; a server goes on beside what follows."""
    program, *words = shlex.split(command)
    assert program == "dylora-moe", command
    port = ["--port", "0"] if words[0] == "serve" else []
    done = CliRunner().invoke(app, [*words, *port])
    assert done.exit_code == 0, f"{command}: {done.output} {done.exception!r}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_serving_runs(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dylora_moe.model.background_texts", lambda: background_texts()[:20])
    furnish_adapters(tmp_path, base)
    names: dict[str, Any] = {"__name__": "page"}
    answers = []
    with background(monkeypatch) as servers:
        for block in blocks(SERVING, "bash", "python"):
            if block.language == "python":
                exec(compile(block.text.replace(ADDRESS, servers.url), f"serving.md: {block.key}", "exec"), names)
                continue
            for command in commands_of(block.text):
                program, *words = shlex.split(command)
                if program == "curl":
                    answers.append(servers.curl(words))
                elif not_run(command) is None:
                    run(command)
    assert "no model 'ours:cooking'; there are ours, ours:base, ours:sql, ours:law." in capsys.readouterr().out
    assert names["forced"].model == "ours:sql"
    assert {weight for token in names["choice"].routing for weight in token["weights"]} <= {"sql", "law", "base"}
    assert names["chunk"].usage.completion_tokens
    chat, experts, texts, health, metrics, novelty, added, renamed, removed, learning = answers
    assert json.loads(chat)["model"] == json.loads(experts)["model"] == "ours"
    assert len(json.loads(texts)["choices"]) == 2
    assert json.loads(health) == {"status": "ok"}
    assert 'dylora_moe_expert_tokens_total{expert="law"}' in metrics
    assert json.loads(novelty)["data"][0]["nearest"]
    found = [[each["id"] for each in json.loads(answer)["data"]] for answer in (added, renamed, removed)]
    assert found == [["sql", "law", last, "base"] if last else ["sql", "law", "base"] for last in ("sums", "math", "")]
    assert json.loads(learning)["status"] == "running"


def test_strangers_adapters_are_routed_by_the_recipe_of_the_page(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path, base)
    (recipe,) = (block.text for block in blocks(ROOT / "docs" / "training.md", "yaml") if "adapters/sql" in block.text)
    Path("strangers.yaml").write_text(recipe.replace(HUB_ID, base))
    done = CliRunner().invoke(app, ["train", "strangers.yaml", "--set", "train.max_steps=2", "--no-report"])
    assert done.exit_code == 0, done.output
    assert DyLoraMoE.from_pretrained("runs/routed").expert_names == ["sql", "law", "math"]
