"""Every way of training, its stages, and going on after a run was cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dylora_moe import CheckpointError, DyLoraMoE
from dylora_moe.report.terminal import results_tables
from dylora_moe.routing.router import ROUTERS
from dylora_moe.schema import RecipeError
from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.run.job import Job
from dylora_moe.training.run.lock import FolderLock
from dylora_moe.training.run.plan import plan
from runs import QUIET, SPECIALISTS, STAGED, assert_same_run, history, run, tensors, write

# ---------------------------------------------------------------------- stages


def test_staged_trains_each_expert_alone_then_the_router(content, tmp_path):
    job = run(content(**{**STAGED, "joint_steps": None}))
    assert job.results.reloaded_identical
    stages = tmp_path / "run" / "stages"
    assert sorted(folder.name for folder in stages.iterdir()) == ["expert-cart", "expert-date", "router"]
    # of an expert's stage only that expert is kept, and it is the one in the mixture
    assert [f.name for f in (stages / "expert-cart" / "trained").iterdir() if f.is_dir()] == ["cart"]
    final = tensors(tmp_path / "run")
    for name in ("date", "cart"):
        trained = load_file(stages / f"expert-{name}" / "trained" / name / "adapter_model.safetensors")
        assert all(torch.equal(value, final[f"{name}/adapter_model/{key}"]) for key, value in trained.items())
    rows = history(tmp_path / "run")
    assert {row["stage"] for row in rows} == {"expert-date", "expert-cart", "router"}
    assert not any("router/balance" in row for row in rows if row["stage"] != "router")
    assert any("router/load/cart" in row for row in rows if row["stage"] == "router")
    model = DyLoraMoE.from_pretrained(str(tmp_path / "run"))
    assert not model.frozen_experts


def test_specialists_train_in_mixed_batches_each_row_its_own_expert_then_the_router(content, tmp_path, monkeypatch):
    seen: list[tuple[str, ...]] = []
    forward = DyLoraMoE.forward

    def noting(self, *args, **inputs):
        if self.training:
            seen.append(tuple(inputs.get("experts") or ()))
        return forward(self, *args, **inputs)

    monkeypatch.setattr(DyLoraMoE, "forward", noting)
    mixed = {"mixing": "equal", "train_sampling_strategy": "sequential"}
    job = run(content(**SPECIALISTS, **mixed))
    assert job.results.reloaded_identical
    assert [set(experts) for experts in seen] == [{"date", "cart"}] * 4 + [set()] * 4
    stages = tmp_path / "run" / "stages"
    assert sorted(folder.name for folder in stages.iterdir()) == ["router", "specialists"]
    assert sorted(f.name for f in (stages / "specialists" / "trained").iterdir() if f.is_dir()) == ["cart", "date"]
    final = tensors(tmp_path / "run")
    for name in ("date", "cart"):
        trained = load_file(stages / "specialists" / "trained" / name / "adapter_model.safetensors")
        assert all(torch.equal(value, final[f"{name}/adapter_model/{key}"]) for key, value in trained.items())
    assert not any("router/balance" in row for row in history(tmp_path / "run") if row["stage"] == "specialists")
    assert not DyLoraMoE.from_pretrained(str(tmp_path / "run")).frozen_experts


@pytest.mark.slow
def test_specialists_one_stage_after_another_equal_the_whole_run(content, tmp_path):
    run(content(**SPECIALISTS))
    Job(parse_recipe(content("apart", **SPECIALISTS)), QUIET).begin()
    for stage in ("specialists", "router"):
        run(content("apart", **SPECIALISTS), only=stage)
    run(content("apart", **SPECIALISTS), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "apart")


def test_a_router_in_closed_form_is_fitted_on_each_expert_s_own_examples(content, tmp_path, monkeypatch):
    """With a linear router in its place: who is taught what, and what is kept."""
    monkeypatch.setitem(ROUTERS, "closed_form", ROUTERS["linear"])
    taught: dict[str, list[str]] = {}

    def teach_many(self, examples, tokenizer, separator):
        for name, rows in examples.items():
            taught[name] = [row.prompt for row in rows]
            column = self.expert_names.index(name)
            for parameter in self.router.parameters():
                parameter.data[column] = column + 1.0
        assert tokenizer is not None
        assert separator == "\n"

    monkeypatch.setattr(DyLoraMoE, "teach_many", teach_many)
    train = {"method": "specialists", "max_steps": 2, "router_learning_rate": None, "domain_coefficient": 0}
    job = run(content(**train))
    assert taught == {name: [row.prompt for row in job.train[name]] for name in ("date", "cart")}
    fitted = tensors(tmp_path / "run")
    router = [value for key, value in fitted.items() if key.startswith("router")]
    assert all(set(value[column].flatten().tolist()) == {column + 1.0} for value in router for column in range(2))
    assert {row["stage"] for row in history(tmp_path / "run")} == {"specialists"}
    assert [(stage.name, stage.steps, stage.rows) for stage in plan(job.recipe).stages][1] == ("fit", 0, 32)
    taught.clear()
    run(content(**train), resume=True)  # what is finished is taken over
    assert not taught
    assert all(torch.equal(value, fitted[key]) for key, value in tensors(tmp_path / "run").items())


@pytest.mark.slow
def test_stages_do_not_hang_on_one_another(content, tmp_path):
    """The second expert is trained alike whether the first was trained before it or not."""
    run(content(**STAGED))
    job = Job(parse_recipe(content("apart", **STAGED)), QUIET)
    job.begin()
    Job(job.recipe, QUIET).run(only="expert-cart")
    Job(job.recipe, QUIET).run(only="expert-date")
    Job(job.recipe, QUIET).run(resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "apart")


def test_only_an_unknown_stage_is_refused(content):
    with pytest.raises(ValueError, match="no stage 'expert-law'; the stages are expert-date"):
        run(content(**STAGED), only="expert-law")


def test_stages_one_after_another_equal_the_whole_run(content, tmp_path):
    """The router's stage goes on from the experts that were trained, and the joint one from all of them."""
    run(content(**STAGED))
    Job(parse_recipe(content("apart", **STAGED)), QUIET).begin()
    for stage in ("expert-date", "expert-cart", "router", "joint"):
        run(content("apart", **STAGED), only=stage)
    run(content("apart", **STAGED), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "apart")


def test_a_stage_alone_needs_its_run_and_the_stages_before_it(content, capsys):
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        run(content(**STAGED), only="expert-date")
    Job(parse_recipe(content(**STAGED)), QUIET).begin()
    with pytest.raises(RecipeError, match=r"learning_rate was 0\.01, is 5"):
        run(content(**STAGED, learning_rate=5), only="expert-date")
    run(content(**STAGED), only="expert-date")
    with pytest.raises(ValueError, match=r"stage router goes on from expert-cart, which is not finished.*expert-cart"):
        run(content(**STAGED), only="router")
    Job(parse_recipe(content(**STAGED)), Console()).run(only="expert-date")
    assert "expert-date is already finished" in capsys.readouterr().out


def test_router_method_leaves_adapters_as_they_were(content, tmp_path):
    run(content("first", max_steps=2))
    second = content("second", method="router", max_steps=3)
    second["experts"] = {
        name: {**expert, "adapter": str(tmp_path / "first" / name)} for name, expert in second["experts"].items()
    }
    run(second)
    before, after = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) == (not key.startswith("router")), key


def test_expert_method_goes_on_with_one_expert_of_a_mixture(content, tmp_path):
    run(content("first", max_steps=2))
    second = content("second", max_steps=3, method="expert", expert="cart")
    for key in ("router_learning_rate", "domain_coefficient"):
        del second["train"][key]
    second |= {"start": str(tmp_path / "first"), "mixture": {"top_k": 1}, "base": {}}
    del second["experts"]["date"]
    job = run(second)
    assert job.recipe.base.model is None
    before, after = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    for key, value in before.items():
        assert torch.equal(value, after[key]) == (not key.startswith("cart")), key
    model = DyLoraMoE.from_pretrained(str(tmp_path / "second"))
    assert model.moe_config.top_k == 1
    assert not model.frozen_experts  # what the recipe does not name is as it was, for the next training as well


def test_a_started_mixture_gains_an_expert(content, tmp_path, base):
    run(content("first", max_steps=2))
    second = content("second", max_steps=2)
    second |= {"start": str(tmp_path / "first"), "mixture": {}}
    second["experts"]["sql"] = {"data": {"skill": "sql", "train": 8, "test": 2}, "lora": {"r": 2}}
    second["experts"]["date"] = {"frozen": True}
    run(second)
    model = DyLoraMoE.from_pretrained(str(tmp_path / "second"))
    assert model.expert_names == ["date", "cart", "sql"]
    assert set(model.expert_states.values()) == {"routed"}
    assert model.peft_config["sql"].r == 2
    before, after = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert all(torch.equal(value, after[key]) for key, value in before.items() if key.startswith("date"))


def test_new_and_imported_experts_side_by_side(content, tmp_path):
    run(content("first", max_steps=2))
    second = content("second", max_steps=2)
    second["experts"]["date"] |= {"adapter": str(tmp_path / "first" / "date"), "frozen": True}
    run(second)
    before, after = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert all(torch.equal(value, after[key]) for key, value in before.items() if key.startswith("date"))
    assert DyLoraMoE.from_pretrained(str(tmp_path / "second")).frozen_experts == {"date"}


def test_validation_rows_are_held_out_and_the_best_model_is_chosen(content, tmp_path):
    train = {"max_steps": 4, "validation": 3, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    job = run(content(**train, load_best_model_at_end=True, early_stopping_patience=5))
    assert {name: len(rows) for name, rows in job.validation.items()} == {"date": 3, "cart": 3}
    seen = {example.prompt for rows in job.train.values() for example in rows}
    assert not seen & {example.prompt for rows in job.validation.values() for example in rows}
    evaluated = [row for row in history(tmp_path / "run") if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [2, 4]
    assert all("eval_loss/date" in row for row in evaluated)


def test_every_option_at_once(content, tmp_path):
    job = run(
        content(
            max_steps=4,
            two_phase={"seeding": 0.5, "consolidation": 0.1},
            temperature_start=4.0,
            router_weight_decay=0.0,
            label_smoothing_factor=0.1,
            gradient_accumulation_steps=2,
            activation_checkpointing=True,
            bf16=True,
            report_to="tensorboard",
            logging_steps=1,
        )
    )
    assert job.results.reloaded_identical
    rows = [row for row in history(tmp_path / "run") if "loss" in row]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    events = list((tmp_path / "run" / "stages" / "joint").rglob("events.out.tfevents.*"))
    assert len(events) == 1
    assert events[0].stat().st_size > 200


# ---------------------------------------------------------------------- resume


@pytest.mark.slow  # processes; tests/training/trainer/test_checkpoints.py resumes in one
@pytest.mark.parametrize("train", [{"max_steps": 8}, STAGED], ids=["joint", "staged"])
def test_killed_and_resumed_equals_uninterrupted_bitwise(content, tmp_path, train):
    """kill -9 at a moment that nobody chose, three times, through the command line."""
    run(content("whole", **train))
    file = write(content("cut", **train), tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "dylora_moe", "train", str(file)]
    folder, kills = tmp_path / "cut", 0
    for attempt in range(9):
        child = subprocess.Popen(
            [*command, *(["--resume"] if attempt else [])],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        marks = len(list(folder.glob("stages/*/*/complete")))
        while child.poll() is None and (kills == 3 or len(list(folder.glob("stages/*/*/complete"))) <= marks):
            time.sleep(0.002)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        message = child.communicate()[1].decode()
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, message
    assert kills == 3
    assert_same_run(tmp_path / "whole", folder)


def test_resume_after_the_stages_measures_again(content, tmp_path):
    first = run(content(max_steps=2))
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "router.safetensors").unlink()
    again = run(content(max_steps=2), resume=True)
    assert again.results.columns == first.results.columns


def test_a_run_that_cannot_start_leaves_the_finished_one(content, tmp_path, capsys):
    run(content(max_steps=2))
    before = (tmp_path / "run" / "results.json").read_bytes()
    broken = content(max_steps=2)
    broken["mixture"]["target_modules"] = ["no_such_layer"]
    with pytest.raises(ValueError, match="no_such_layer"):
        run(broken)
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    Job(parse_recipe(content(max_steps=2)), Console(width=1000)).run()
    assert f"The finished run in {tmp_path / 'run'} is replaced." in capsys.readouterr().out


def test_a_run_that_is_being_trained_is_left_alone(content, tmp_path):
    with FolderLock(tmp_path / "run").hold(), pytest.raises(ValueError, match=f"pid {os.getpid()}"):
        run(content(max_steps=2))


def test_a_failed_save_names_the_last_whole_checkpoint(content, tmp_path, monkeypatch):
    from dylora_moe.training.trainer.trainer import MoETrainer

    def full(self, folder, **options):
        if folder.endswith("trained"):
            raise OSError(28, "No space left on device")
        save(self, folder, **options)

    save = MoETrainer.save_model
    monkeypatch.setattr(MoETrainer, "save_model", full)
    with pytest.raises(CheckpointError, match="No space left") as raised:
        run(content(max_steps=4))
    assert "--resume" in str(raised.value)
    monkeypatch.undo()
    run(content(max_steps=4), resume=True)
    assert (tmp_path / "run" / "results.json").is_file()


def test_without_held_out_data_nothing_is_compared(content, tmp_path):
    file = tmp_path / "date.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    results = run({**content(max_steps=1), "experts": {"date": {"data": {"train": str(file)}}}}).results
    assert results.reloaded_identical is None
    assert results_tables(results) == []
