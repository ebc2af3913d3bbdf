"""Evaluation during training: every token weighs the same, whatever the batches; the best model comes back whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import EarlyStoppingCallback

from dylora_moe import DyLoraMoE
from tinybase import tiny_base
from trainers import run


def by_hand(trainer, forced=False) -> dict[str, float]:
    """The loss of every example by itself, routed as in evaluation."""
    sums = {"a": [0.0, 0], "b": [0.0, 0]}
    model = trainer.mixture.eval()
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(ids, experts=row["domain"] if forced else None).logits[0, :-1]
        sums[row["domain"]][0] += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        sums[row["domain"]][1] += int((labels[1:] != -100).sum())
    total, count = (sum(pair[i] for pair in sums.values()) for i in range(2))
    return {"eval_loss": total / count, **{f"eval_loss/{name}": t / n for name, (t, n) in sums.items()}}


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_evaluation_loss_is_a_mean_over_tokens(tmp_path, batch):
    trainer = run(tmp_path, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate()
    for key, value in by_hand(trainer).items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    assert trainer.state.log_history[-1]["eval_loss/a"] == metrics["eval_loss/a"]


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_packed_training_is_evaluated_row_by_row(tmp_path, options):
    trainer = run(tmp_path, **options)
    metrics = trainer.evaluate()
    for key, value in by_hand(trainer).items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key


def test_forced_stage_is_evaluated_forced(tmp_path):
    trainer = run(tmp_path, trainer={"force_domains": True})
    metrics, expected = trainer.evaluate(), by_hand(trainer, forced=True)
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert metrics["eval_loss"] != pytest.approx(by_hand(trainer)["eval_loss"], rel=1e-5)


def test_best_model_is_restored_with_router_and_early_stopping_ends_the_run(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 3e-2}
    trainer = run(tmp_path, [EarlyStoppingCallback(2)], max_steps=60, **options)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) < 60, "early stopping did not stop"
    assert min(losses) < losses[-1], "the last model is the best: this test proves nothing"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    best = DyLoraMoE.from_pretrained(trainer.state.best_model_checkpoint, base=tiny_base())
    for (name, ours), theirs in zip(trainer.mixture.router.named_parameters(), best.router.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_patience_survives_resume(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 3e-2}
    whole = run(tmp_path / "whole", [EarlyStoppingCallback(3)], max_steps=60, **options)
    whole.train()
    stopped_at = whole.state.global_step
    # cut off one step before the end, with the patience half used
    for folder in (tmp_path / "whole").glob(f"checkpoint-{stopped_at}"):
        (folder / "complete").unlink()
    again = run(tmp_path / "whole", [EarlyStoppingCallback(3)], max_steps=60, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == stopped_at
