"""The continual-learning benchmark in small: every method through three made-up tasks, cut off and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

import cells
import scoring
from dylora_moe.data.examples import Example, encode
from loop import completion_loss
from methods import METHODS, Budget, Ours
from scoring import label_losses, rouge_l, score
from summary import Course as Summary
from summary import auroc, course_name, figure, table
from tasks import ORDERS, batches, read_tasks
from tinybase import save_tiny_base

NAMES = ORDERS["small"][0]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """All methods, learnt; small budgets."""
    folder = tmp_path_factory.mktemp("lifelong")
    base = save_tiny_base(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tasks = read_tasks("small", 1, None, tokenizer, rows=12, held_out=6, max_length=64, seed=0)
    budget = Budget(steps=2, batch=4, rank=2, wide=2)
    name, noted = course_name("small", 1, 0), {"rows": 12}
    made = cells.Course(name, tasks, base, tokenizer, budget, folder / "results", folder / "work", noted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "NEW_TOKENS", 2)
        for method in METHODS:
            made.run(method)
        yield made


def cell(course, method: str, stage: int) -> dict:
    return json.loads((course.results / f"{course.name}-{method}-{stage:02}.json").read_text())


def test_what_is_measured_after_each_stage(course):
    for method, kind in METHODS.items():
        measured = [list(cell(course, method, stage)["scores"]) for stage in course.stages(method)]
        between = [list(NAMES[:2]), list(NAMES[1:])] if kind.sequential else [[], []]
        assert measured == ([list(NAMES)] if method == "base" else [*between, list(NAMES)]), method
    assert [list(cell(course, "ours", stage)["oracle"]) for stage in range(3)] == [["letters"], ["digits"], list(NAMES)]
    assert sum(cell(course, "ours", 2)["scores"]["digits"]["chosen"].values()) == 6


def test_an_expert_that_is_forced_forgets_nothing_bit_for_bit(course):
    last = cell(course, "ours", 2)["oracle"]
    for stage, name in enumerate(NAMES):
        assert cell(course, "ours", stage)["oracle"][name] == last[name]
    assert Summary.read(course.results, "small", 1, 0).numbers("oracle")["backward"] == 0
    one = [cell(course, "sequential", stage)["scores"]["digits"]["loss"] for stage in (1, 2)]
    assert one[0] != one[1]  # where something can be forgotten it shows


def test_the_learning_rate_is_the_best_of_three_around_the_rule(course):
    assert Budget(rank=8, rate=2e-3).rates(32) == pytest.approx([0.5e-3, 1e-3, 2e-3])
    tried = [json.loads(file.read_text()) for file in course.results.glob(f"{course.name}-rate-r2-*.json")]
    assert len(tried) == 3
    for method in ("sequential", "replay", "joint", "olora"):
        assert cell(course, method, 2)["rate"] == min(tried, key=lambda one: one["loss"])["rate"]
    assert cell(course, "ours", 2)["rate"] == course.budget.rate


@pytest.mark.parametrize("method", ["ours", "joint"])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(course, method, tmp_path, monkeypatch):
    again = replace(course, results=tmp_path / "results", work=tmp_path / "work")
    for file in course.results.glob(f"{course.name}-rate-*.json"):
        again.write(again.results / file.name, json.loads(file.read_text()))
    whole, learn = cell(course, method, 2), METHODS[method].learn

    def stopping(self, stage):
        if stage == 1:
            raise KeyboardInterrupt
        learn(self, stage)

    monkeypatch.setattr(METHODS[method], "learn", stopping)
    with pytest.raises(KeyboardInterrupt):
        again.run(method)
    learnt = []
    monkeypatch.setattr(METHODS[method], "learn", lambda self, stage: (learnt.append(stage), learn(self, stage)))
    again.run(method)
    assert learnt == [1, 2]
    assert {**cell(again, method, 2), "seconds": 0} == {**whole, "seconds": 0}
    again.run(method)
    assert learnt == [1, 2]  # nothing is measured twice


def test_cells_of_other_settings_are_refused(course):
    with pytest.raises(ValueError, match="give another --out"):
        replace(course, noted={"rows": 13}).run("ours")


def test_labels_are_scored_as_if_each_were_a_row_of_its_own(course):
    method = Ours(course.base, course.tokenizer, course.tasks, course.budget, 1e-2)
    method.learn(0)
    rows, labels = course.tasks[1].test[:3], ("odd", "even", "neither of them")
    for force in ({"experts": "letters"}, {}):
        losses, lengths, names = label_losses(method.model, rows, labels, course.tokenizer, **force)
        assert names == ([] if force else ["letters"] * 3)
        for i, row in enumerate(rows):
            for j, label in enumerate(labels):
                example = Example(row.prompt, label)
                ids, prompt = encode(example, course.tokenizer)
                assert lengths[i][j] == len(ids) - prompt
                with torch.no_grad():
                    alone = completion_loss(method.model, [example], course.tokenizer, experts="letters")
                assert float(losses[i, j]) / lengths[i][j] == pytest.approx(float(alone), rel=1e-4)


def test_tasks_with_labels_are_scored_by_accuracy_and_others_by_what_is_written(course):
    assert [bool(task.labels) for task in course.tasks] == [True, True, False]
    method = Ours(course.base, course.tokenizer, course.tasks, course.budget, 1e-2)
    method.learn(0)
    found = score(method.model, course.tasks[0], course.tokenizer)
    assert set(found["each"]) <= {0.0, 100.0}
    assert found["chosen"] == {"letters": 6}
    assert set(score(method.model, course.tasks[2], course.tokenizer)) == {"score", "loss", "each", "chosen"}


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    assert rouge_l("the cat sat", "The cat sat") == 1
    assert rouge_l("a b c d", "a x c") == pytest.approx(4 / 7)
    assert rouge_l("b a", "a b") == 0.5
    assert rouge_l("", "a") == 0


def test_a_long_prompt_loses_its_middle(course):
    kept = {"rows": 12, "held_out": 6, "seed": 0}
    task = read_tasks("small", 1, None, course.tokenizer, max_length=20, **kept)[0]
    assert all(row.prompt.startswith("First") and row.prompt.endswith("?") for row in task.train)
    assert max(len(encode(row, course.tokenizer)[0]) for row in task.train) <= 24
    with pytest.raises(ValueError, match="--order 4"):
        read_tasks("small", 4, None, course.tokenizer, max_length=20, **kept)


def test_batches_are_whole_passes_of_like_lengths_and_the_same_by_seed():
    rows = [Example("x" * i, "y") for i in range(40)]
    made = batches(rows, 10, 8, "seed")
    assert [len(batch) for batch in made] == [8] * 10
    assert sorted(len(row.prompt) for batch in made for row in batch) == sorted([*range(40)] * 2)
    assert made == batches(rows, 10, 8, "seed")
    assert made != batches(rows, 10, 8, "other")


def test_table_and_figure_mark_what_was_not_run(course, tmp_path):
    whole = table(course.results, "small", 1, [0])
    assert "not run" not in whole.replace("not run | not run |", "")  # novelty alone, while the mixture has none
    for file in course.results.glob(f"{course.name}-*.json"):
        if "joint" not in file.name and "replay-02" not in file.name:
            (tmp_path / file.name).write_text(file.read_text())
    rows = {line.split(" | ")[0].strip("| "): line for line in table(tmp_path, "small", 1, [0]).splitlines()}
    assert "not run" in rows["one LoRA, all tasks at once"]
    assert "not run beyond task 2 of 3" in rows["one LoRA, 2 % replayed"]
    assert " 0.0 |" in rows["ours, own expert forced"]
    figure(course.results, "small", 1, 0).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_auroc_counts_pairs():
    assert auroc([0.0, 1.0], [2.0, 3.0]) == 1
    assert auroc([0.0, 1.0], [0.0, 1.0]) == 0.5
