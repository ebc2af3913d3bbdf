"""The commands that keep a mixture in order: what they print, what the folder then holds, and what stays as it was."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dylora_moe import DyLoraMoE, MoELoraConfig, keeping
from dylora_moe.cli import app, main
from dylora_moe.training.run.lock import FolderLock
from tinybase import tiny_base, tiny_tokenizer
from topics import NAMES, texts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LAYERS = 2
FOUR = NAMES[:4]
OTHERS = ("sql", "math")


def made(base: str, names: tuple[str, ...] = FOUR, taught: tuple[str, ...] = FOUR[:3], **settings) -> DyLoraMoE:
    """A mixture on a saved base that was taught some of its experts."""
    settings = {"router_type": "closed_form", "router_layer": 1, "target_modules": ["q_proj"], "r": 2, **settings}
    torch.manual_seed(1)
    config = MoELoraConfig(expert_names=list(names), init_lora_weights=False, **settings)
    model = DyLoraMoE.from_base(base, config).eval()
    for name in taught:
        model.teach(name, texts(NAMES.index(name), 6))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_base(LAYERS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "mixture"
    made(base).save_pretrained(folder)
    return folder


@pytest.fixture
def mixture(saved, tmp_path) -> Path:
    """A checkpoint with its tokenizer and what else a run leaves beside it."""
    folder = tmp_path / "mixture"
    shutil.copytree(saved, folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "results.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def _wide(monkeypatch) -> None:
    """Tables as wide as they are, whatever the terminal of whoever came first."""
    monkeypatch.setattr(keeping, "console", Console(width=160, emoji=False))


def run(*words) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def loaded(folder: Path) -> DyLoraMoE:
    return DyLoraMoE.from_pretrained(str(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def ids() -> torch.Tensor:
    return torch.tensor([tiny_tokenizer()("abcabbdddefi").input_ids])


def outputs(model: DyLoraMoE, *names: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(ids(), experts=name).logits for name in names]


def write_rows(file: Path, topic: int, count: int = 6, seed: int = 0) -> Path:
    """Rows of a topic that all have prompt and completion."""
    rows = [row for row in texts(topic, 2 * count, seed) if isinstance(row, dict)][:count]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def cells(output: str, name: str) -> list[str]:
    """The cells of an expert's row."""
    row = next(line for line in output.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_experts_are_listed(mixture):
    model = loaded(mixture)
    model.freeze_expert("law")
    model.save_pretrained(mixture)
    shown = run("experts", mixture)
    library, (other, value) = model.skills, model.skills.separation()["law"]
    assert cells(shown, "law")[:3] == ["law", "routed, frozen", "2"]
    assert cells(shown, "law")[3:5] == ["6", f"{library['law'].tokens:,}"]
    assert cells(shown, "law")[5] == library["law"].taught[0].when[:10]
    assert cells(shown, "law")[7] == f"{other} {value:.1f}"
    assert cells(shown, "chat") == ["chat", "new", "2", "", "", "", cells(shown, "chat")[6], ""]
    assert "+" in cells(shown, "law")[6]
    assert "router closed_form, token granularity, skills " in shown
    assert "pooled" not in shown
    library.compact()
    model.save_pretrained(mixture)
    assert "pooled (compact)" in run("experts", mixture)


def test_experts_show_the_load_of_a_text_and_of_files(base, mixture, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 0, seed=3)
    long = tmp_path / "text.txt"
    long.write_text("aabaab" * 100)  # the base has 256 positions
    made(base, granularity="sequence").save_pretrained(tmp_path / "sequence")
    for folder, given in ((mixture, rows), (mixture, long), (tmp_path / "sequence", rows), (mixture, "abaabab")):
        shown = run("experts", folder, "--text", given)
        loads = {name: float(cells(shown, name)[-1].removesuffix("%")) for name in FOUR}
        assert max(loads, key=lambda name: loads[name]) == "sql"
        assert sum(loads.values()) == pytest.approx(100, abs=0.3)
        assert loads["chat"] == 0
    with pytest.raises(ValueError, match="--text is empty"):
        run("experts", mixture, "--text", "")


def test_merge(mixture):
    before = loaded(mixture)
    shown = run("merge", mixture, "sql", "law", "--rank", 1, "--weights", "0.7,0.3", "--name", "query")
    after = loaded(mixture)
    cut = before.merge_experts(["sql", "law"], 1, "query", [0.7, 0.3])
    assert f"sql, law → query, rank 1: relative error {cut.error:.4f} over all layers" in shown
    assert f"at most {cut.by_layer[cut.worst]:.4f} ({cut.worst})" in shown
    assert cut.error > 0.1
    assert after.expert_names == ["math", "chat", "query"]
    assert after.expert_states == {"math": "routed", "chat": "new", "query": "routed"}
    assert after.skills["query"].rows == 12
    for found, expected in zip(
        outputs(after, *before.expert_names), outputs(before, *before.expert_names), strict=True
    ):
        assert torch.equal(found, expected)
    assert not (mixture / "sql").exists()
    assert "relative error 0.0000" in run("merge", mixture, "query", "math", "--rank", 3)


def test_rename_and_freeze_and_what_else_is_in_the_folder_stays(mixture):
    before, files = outputs(loaded(mixture), "law")[0], contents(mixture)
    assert "law → legal" in run("rename", mixture, "law", "legal")
    own = {"moe_config.json", "README.md", "skills.json", "skills.safetensors"}
    kept = {name for name in files if name not in own and not name.startswith("law/")}
    assert {"results.json", "tokenizer.json", "router.safetensors", "sql/adapter_model.safetensors"} <= kept
    after = contents(mixture)
    assert {name: after[name] for name in kept} == {name: files[name] for name in kept}
    assert not [name for name in after if name.startswith((".", "law/"))]
    assert "legal is frozen" in run("freeze", mixture, "legal")
    model = loaded(mixture)
    assert model.expert_names == ["sql", "legal", "math", "chat"]
    assert model.frozen_experts == {"legal"}
    assert set(model.skills) == {"sql", "legal", "math"}
    assert torch.equal(outputs(model, "legal")[0], before)
    assert "legal is trainable" in run("freeze", mixture, "legal", "--thaw")
    assert loaded(mixture).frozen_experts == set()


def test_output_leaves_the_folder_as_it_was(mixture, tmp_path):
    before = contents(mixture)
    run("rename", mixture, "law", "legal", "--output", tmp_path / "other")
    assert contents(mixture) == before
    assert loaded(tmp_path / "other").expert_names == ["sql", "legal", "math", "chat"]
    assert AutoTokenizer.from_pretrained(tmp_path / "other").get_vocab() == tiny_tokenizer().get_vocab()
    assert not (tmp_path / "other" / ".lock").exists()
    with pytest.raises(ValueError, match="other holds a mixture already"):
        run("rename", mixture, "law", "legal", "--output", tmp_path / "other")


def test_nothing_is_written_over_a_mixture_or_an_expert_of_it(mixture):
    before = contents(mixture)
    with pytest.raises(ValueError, match="is an expert's folder of the mixture"):
        run("export", mixture, "sql", mixture / "law")
    with pytest.raises(ValueError, match="holds a mixture already"):
        run("export", mixture, "sql", mixture)
    with pytest.raises(ValueError, match="is an expert's folder of the mixture"):
        run("freeze", mixture, "sql", "--output", mixture / "law")
    assert contents(mixture) == before


def test_a_readme_of_somebody_elses_stays(mixture, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"other/README.md is in the way.* Move it, or choose another folder"):
        run("freeze", mixture, "sql", "--output", other)
    assert contents(other) == {"README.md": b"mine"}
    run("export", mixture, "sql", other)
    assert (other / "README.md").read_text() == "mine"


def test_a_forgotten_expert_leaves_the_others_as_if_it_had_never_been_taught(mixture, base, tmp_path):
    never = made(base, taught=OTHERS)
    never.forget("law")
    never.save_pretrained(tmp_path / "never")
    forced = outputs(loaded(mixture), *OTHERS)
    assert "as if it had never been there" in run("forget", mixture, "law")
    found, expected = loaded(mixture), loaded(tmp_path / "never")
    assert found.expert_names == expected.expert_names == ["sql", "math", "chat"]
    with torch.no_grad():
        assert torch.equal(found(ids()).router_logits, expected(ids()).router_logits)
        assert torch.equal(found(ids()).logits, expected(ids()).logits)
    for one, other in zip(outputs(found, *OTHERS), forced, strict=True):
        assert torch.equal(one, other)


def test_a_compact_skill_is_forgotten_only_if_asked(mixture):
    model = loaded(mixture)
    model.skills.compact()
    model.save_pretrained(mixture)
    before = contents(mixture)
    with pytest.raises(ValueError, match="'law' is compact"):
        run("forget", mixture, "law")
    assert contents(mixture) == before
    assert "law was forgotten; the others are what they were" in run("forget", mixture, "law", "--inexact")
    assert set(loaded(mixture).skills) == {"sql", "math"}


def test_remove_leaves_the_other_rows(mixture):
    before = loaded(mixture).router.state_dict()
    assert "law was removed" in run("remove", mixture, "law")
    model = loaded(mixture)
    assert torch.equal(model.router.get_parameter("weight"), before["weight"][[0, 2, 3]])
    assert set(model.skills) == {"sql", "math"}


def test_teach_adds_to_a_skill_and_says_where_texts_go(mixture, tmp_path):
    rows = write_rows(tmp_path / "chat.jsonl", 3)
    shown = run("teach", mixture, "chat", rows)
    assert "chat was taught 6 rows, in all 6 rows" in shown
    assert "left out" in shown
    assert "are the same" not in shown
    model = loaded(mixture)
    assert model.expert_states["chat"] == "routed"
    assert model.skills["chat"].taught[0].source.startswith("sha256:")
    assert "in all 12 rows" in run("teach", mixture, "chat", write_rows(tmp_path / "more.jsonl", 3, seed=1))
    with pytest.raises(ValueError, match=r"no file '.*gone.jsonl' with texts"):
        run("teach", mixture, "chat", tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"separator '\\n', ' : '"):
        run("teach", mixture, "chat", rows, "--separator", " : ")


def test_two_experts_for_the_same_texts_are_named(mixture, tmp_path):
    shown = run("teach", mixture, "chat", write_rows(tmp_path / "chat.jsonl", 1, seed=4))
    assert "chat and law are the same as far as their rows tell" in shown
    assert "chat and law are the same" in run("experts", mixture)


def test_a_trained_router_is_left_alone(base, tmp_path):
    made(base, taught=(), router_type="mlp").save_pretrained(tmp_path / "mixture")
    before = loaded(tmp_path / "mixture").router.state_dict()
    shown = run("teach", tmp_path / "mixture", "chat", write_rows(tmp_path / "chat.jsonl", 3))
    assert "The router (mlp) is trained and stays as it is" in shown
    assert "sql_law is new" in run("merge", tmp_path / "mixture", "sql", "law", "--rank", 2)
    model = loaded(tmp_path / "mixture")
    assert model.expert_states == {"math": "routed", "chat": "routed", "sql_law": "new"}
    assert torch.equal(model.router.get_parameter("up")[:2], before["up"][2:])


def test_export_and_import(mixture, base, tmp_path):
    run("export", mixture, "law", tmp_path / "law")
    stock = PeftModel.from_pretrained(tiny_base(LAYERS), str(tmp_path / "law")).eval()
    with torch.no_grad():
        assert torch.equal(stock(ids()).logits, outputs(loaded(mixture), "law")[0])
    before = loaded(mixture).router.state_dict()
    shown = run("import", mixture, "tax", tmp_path / "law")
    assert "tax was added" in shown
    assert "tax is new" in shown
    model = loaded(mixture)
    assert (model.expert_states["tax"], "tax" in model.frozen_experts) == ("new", True)
    assert torch.equal(model.router.get_parameter("weight")[:4], before["weight"])
    shown = run("import", mixture, "code", tmp_path / "law", "--texts", write_rows(tmp_path / "code.jsonl", 4))
    assert "code was taught 6 rows" in shown
    assert "is new" not in shown
    assert loaded(mixture).expert_states["code"] == "routed"


def test_an_adapter_for_another_base_changes_nothing(mixture, tmp_path):
    torch.manual_seed(0)
    get_peft_model(tiny_base(3), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "odd")
    before = contents(mixture)
    with pytest.raises(ValueError, match="tensors that this LlamaForCausalLM does not have"):
        run("import", mixture, "tax", tmp_path / "odd")
    assert contents(mixture) == before


@pytest.mark.parametrize(
    "words", [["rename", "law", "legal"], ["remove", "law"], ["merge", "sql", "law", "--rank", "2"], ["export", "law"]]
)
def test_a_base_of_other_weights_is_refused(mixture, base, tmp_path, words):
    model = tiny_base(LAYERS)
    model.save_pretrained(tmp_path / "moved")
    tiny_tokenizer().save_pretrained(tmp_path / "moved")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    before, (command, *rest) = contents(mixture), words
    rest += [tmp_path / "law"] if command == "export" else []
    with pytest.raises(ValueError, match=r"--base .*other: its weights are not those of the base"):
        run(command, mixture, *rest, "--base", tmp_path / "other")
    assert contents(mixture) == before
    assert not (tmp_path / "law").exists()
    run(command, mixture, *rest, "--base", tmp_path / "moved")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "DIR", "sql", "lax", "--rank", "2"], "unknown expert 'lax'; the experts are sql, law, math, chat"),
        (["merge", "DIR", "sql", "law", "--rank", "2", "--weights", "a,b"], "--weights 'a,b': numbers separated by"),
        (["rename", "DIR", "law", "sql"], "expert 'sql' exists already; the experts are sql, law, math, chat"),
        (["import", "DIR", "tax", "./adapter"], "no such folder"),
        (["import", "DIR", "tax", "adapter", "--texts", "gone.jsonl"], "no file 'gone.jsonl'"),
        (["rename", "nowhere", "law", "x"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_message_and_change_nothing(mixture, words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = contents(mixture)
    monkeypatch.setattr(sys, "argv", ["dylora-moe", *(str(mixture) if word == "DIR" else word for word in words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert contents(mixture) == before
    assert not (tmp_path / "nowhere").exists()


def test_the_last_expert_stays(base, tmp_path):
    made(base, ("sql",), ()).save_pretrained(tmp_path)
    for command in ("remove", "forget"):
        with pytest.raises(ValueError, match="'sql' is the only expert"):
            run(command, tmp_path, "sql")


def _hold(folder: Path, taken, done) -> None:
    with FolderLock(folder).hold():
        taken.set()
        done.wait(60)


def test_a_folder_in_use_is_refused(mixture):
    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(mixture, taken, done))
    holder.start()
    try:
        assert taken.wait(60)
        with pytest.raises(ValueError, match="another process"):
            run("freeze", mixture, "law")
    finally:
        done.set()
        holder.join()
    run("freeze", mixture, "law")


def test_what_fails_while_saving_leaves_the_old_mixture_whole(mixture, monkeypatch):
    before = contents(mixture)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("dylora_moe.checkpoint.mixture.write_skills", full)
    with pytest.raises(OSError, match="No space"):
        run("forget", mixture, "law")
    assert contents(mixture) == before
    assert [path.name for path in mixture.parent.iterdir()] == ["mixture"]


def test_another_base_is_heeded(mixture, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    run("freeze", mixture, "law", "--base", moved)
    assert loaded(mixture).base_name == str(moved)
