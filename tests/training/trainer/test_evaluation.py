"""Evaluation during training: every token weighs the same, whatever the batches; the best model comes back whole."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import EarlyStoppingCallback
from trl import SFTConfig

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.training.trainer.callbacks import StarvedExperts
from dylora_moe.training.trainer.trainer import MoETrainer
from tinybase import tiny_base, tiny_tokenizer

ROWS = [{"prompt": f"ask {i}", "completion": " yes" * (1 + i % 5), "domain": "ab"[i % 2]} for i in range(11)]


def run(folder, callbacks=(), rows=ROWS, trainer=None, **options) -> MoETrainer:
    torch.manual_seed(1)
    config = MoELoraConfig(expert_names=["a", "b"], r=4, target_modules="all-linear", init_lora_weights=False, top_k=1)
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "activation_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        **options,
    }
    return MoETrainer(
        DyLoraMoE.from_base(tiny_base(), config),
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        **(trainer or {}),
    )


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


def test_packing_equals_unpacked_on_the_same_tokens(tmp_path):
    def step(packed: bool):
        packing = {"packing": True, "max_length": 64} if packed else {}
        trainer = run(
            tmp_path / str(packed),
            max_steps=1,
            per_device_train_batch_size=16,
            learning_rate=0.0,
            max_grad_norm=0.0,
            trainer={"domain_coefficient": 0.5},
            **packing,
        )
        grads = {}
        optimizer_step = trainer.create_optimizer().step
        trainer.optimizer.step = lambda *args, **kwargs: (
            grads.update({n: p.grad.clone() for n, p in trainer.mixture.named_parameters() if p.grad is not None}),
            optimizer_step(*args, **kwargs),
        )
        trainer.train()
        return grads, trainer

    (packed, trainer), (plain, other) = step(True), step(False)
    assert len(trainer.train_dataset) < len(other.train_dataset)
    assert set(trainer.train_dataset["domain"]) == {"a", "b"}
    assert packed.keys() == plain.keys()
    assert len(packed) > 10
    for name, grad in plain.items():
        torch.testing.assert_close(packed[name], grad, rtol=1e-3, atol=1e-5, msg=name)
    for key in ("loss", "aux_loss", "router/domain_loss", "router/load/a"):
        logged = [next(row[key] for row in t.state.log_history if key in row) for t in (trainer, other)]
        assert logged[0] == pytest.approx(logged[1], rel=1e-4), key


def test_forced_rows_of_several_domains_cannot_share_a_packed_row(tmp_path):
    trainer = run(tmp_path, padding_free=True, max_length=None, trainer={"force_domains": True})
    with pytest.raises(ValueError, match="holds several domains"):
        trainer.train()


def test_router_weight_decay_and_rate_are_its_own(tmp_path):
    trainer = run(tmp_path, weight_decay=0.1, trainer={"router_weight_decay": 0.0, "router_learning_rate": 0.5})
    groups = trainer.create_optimizer().param_groups
    router = {id(p) for p in trainer.mixture.router.parameters()}
    own = [g for g in groups if any(id(p) in router for p in g["params"])]
    assert [(g["weight_decay"], g["lr"]) for g in own] == [(0.0, 0.5)]
    assert {id(p) for p in own[0]["params"]} == router
    assert any(g["weight_decay"] == 0.1 and g["params"] for g in groups)


def test_metrics_of_the_router_are_logged(tmp_path):
    trainer = run(tmp_path, max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert 0.5 <= row["router/max_probability"] <= 1
    assert row["router/load/a"] + row["router/load/b"] == pytest.approx(1, abs=1e-5)
    assert row["router/dead_experts"] == 0
    assert row["tokens_per_second"] > 0


def test_collapse_warns_once_per_famine(caplog):
    watch = StarvedExperts(patience=3)
    with caplog.at_level(logging.WARNING):
        counts = [watch.update({"a": 0.995, "b": share}) for share in (0.0, 0.005, 0.009, 0.0, 0.5, 0, 0, 0)]
    assert counts == [1, 1, 1, 1, 0, 1, 1, 1]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("'b'" in m and "3 steps" in m and "mixture.balance_coefficient" in m for m in messages)
