"""The trainer: its losses do not depend on how a step is cut into micro-batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl import SFTConfig

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig
from dylora_moe.routing.losses import load
from dylora_moe.training.trainer.trainer import MoETrainer
from tinybase import tiny_base, tiny_tokenizer
from trainers import run

ROWS = [{"prompt": f"ask {i}", "completion": " yes" * (1 + i % 3), "domain": ("a", "b")[i % 2]} for i in range(8)]


def mixture(**options) -> DyLoraMoE:
    torch.manual_seed(1)
    settings = {
        "r": 4,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "balance_coefficient": 1.0,
        **options,
    }
    return DyLoraMoE.from_base(tiny_base(), MoELoraConfig(expert_names=["a", "b"], **settings))


def arguments(folder, **options) -> SFTConfig:
    settings = {
        "max_steps": 1,
        "learning_rate": 0.0,
        "activation_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        **options,
    }
    return SFTConfig(output_dir=str(folder), **settings)


class Keep(TrainerCallback):
    """Keeps gradients and logs of the step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs = dict(logs)


def one_step(folder, model, options=None, **trainer_options):
    keep = Keep()
    trainer = MoETrainer(
        model,
        args=arguments(folder, **(options or {})),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        callbacks=[keep],
        **trainer_options,
    )
    trainer.train()
    return keep, trainer


@pytest.mark.parametrize(
    "settings",
    [{}, {"balance_loss": "switch", "z_loss_coefficient": 0.1}, {"granularity": "sequence"}, {"granularity": "prefix"}],
    ids=str,
)
def test_accumulation_changes_neither_loss_nor_gradients(tmp_path, settings):
    whole, _ = one_step(tmp_path, mixture(**settings), {"per_device_train_batch_size": 8}, domain_coefficient=0.5)
    parts, _ = one_step(
        tmp_path,
        mixture(**settings),
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        domain_coefficient=0.5,
    )
    assert whole.grads.keys() == parts.grads.keys()
    assert any("router" in name for name in whole.grads)
    for name, grad in whole.grads.items():
        torch.testing.assert_close(parts.grads[name], grad, rtol=2e-4, atol=2e-6, msg=name)
    for key in ("loss", "aux_loss", "router/balance", "router/load/a"):
        # the sum over micro-batches is logged for the loss, the value of the step for the rest
        assert parts.logs[key] == pytest.approx(whole.logs[key], rel=1e-4), key


def test_router_loss_is_the_models_own_on_the_whole_batch(tmp_path):
    model = mixture()
    keep, trainer = one_step(tmp_path, model, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    batch.pop("domain")
    model.train()
    output = model(**batch)
    assert keep.logs["aux_loss"] == pytest.approx(float(output.aux_loss), rel=1e-4)
    assert keep.logs["router/balance"] == pytest.approx(float(output.balance_loss), rel=1e-4)
    assert keep.logs["router/load/a"] == pytest.approx(
        float(load(output.routing_weights, batch["attention_mask"].bool())[0]), rel=1e-4
    )
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(keep.grads[name], parameter.grad, rtol=2e-4, atol=2e-6, msg=name)


def test_label_smoothing_equals_the_formula(tmp_path):
    model = mixture(balance_loss="none")
    keep, trainer = one_step(tmp_path, model, {"per_device_train_batch_size": 8, "label_smoothing_factor": 0.2})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    batch.pop("domain")
    model.train()
    logits = model(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.2)
    assert keep.logs["loss"] == pytest.approx(float(expected), rel=1e-4)
    expected.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(keep.grads[name], parameter.grad, rtol=2e-4, atol=2e-6, msg=name)


def test_label_smoothing_runs_one_forward(tmp_path):
    model = mixture()
    calls = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    one_step(tmp_path, model, {"per_device_train_batch_size": 8, "label_smoothing_factor": 0.2})
    assert len(calls) == 1


def test_forced_domains_train_each_expert_on_its_own_rows(tmp_path):
    model = mixture()
    only_a = [row for row in ROWS if row["domain"] == "a"]
    keep = Keep()
    MoETrainer(
        model,
        args=arguments(tmp_path, per_device_train_batch_size=4),
        train_dataset=Dataset.from_list(only_a),
        processing_class=tiny_tokenizer(),
        callbacks=[keep],
        force_domains=True,
    ).train()
    assert any(".a." in name for name in keep.grads)
    assert not any(".b." in name or "router" in name for name in keep.grads)


def test_forced_domains_equal_each_expert_alone(tmp_path):
    keep, trainer = one_step(tmp_path, mixture(), {"per_device_train_batch_size": 8}, force_domains=True)
    model = mixture()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    domains = batch.pop("domain")
    total = (batch["labels"][:, 1:] != -100).sum()
    for index, name in enumerate(model.expert_names):
        rows = {key: value[domains[:, 0] == index] for key, value in batch.items()}
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], experts=name).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows["labels"][:, 1:], reduction="sum")
        (losses / total).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(keep.grads[name], parameter.grad, rtol=2e-4, atol=2e-6, msg=name)


def test_domain_loss_teaches_the_router(tmp_path):
    """Separable domains: at least 98 % of the tokens go to the right expert, prompts seen or not."""
    words = {"a": ("sum", "add", "plus"), "b": ("LIST", "SORT", "HEAD")}
    rows = [
        {"prompt": f"{word} {i} {word}", "completion": " ok", "domain": domain}
        for domain, several in words.items()
        for word in several
        for i in range(6)
    ]
    model = mixture()
    options = {"max_steps": 60, "per_device_train_batch_size": 12, "learning_rate": 1e-3, "logging_steps": 60}
    trainer = MoETrainer(
        model,
        args=arguments(tmp_path, **{**options, "train_sampling_strategy": "random"}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        domain_coefficient=1.0,
        router_learning_rate=3e-2,
    )
    trainer.train()
    model.eval()
    model.moe_config.top_k = 1
    tokenizer = tiny_tokenizer()
    right, total = 0, 0
    for column, several in enumerate(words.values()):
        for word in several:
            for number in (23, 51):  # not among the training rows
                weights = model(**tokenizer(f"{word} {number} {word}", return_tensors="pt")).routing_weights[0]
                own = weights[:, column]
                right, total = right + int((own == 1).sum()), total + len(own)
    assert total > 80
    assert right / total >= 0.98


def test_router_has_its_own_learning_rate(tmp_path):
    model = mixture()
    _, trainer = one_step(tmp_path, model, {"per_device_train_batch_size": 8}, router_learning_rate=0.25)
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in model.router.parameters()} == {0.25}
    assert {rates[id(t.tensor)] for t in model.expert_tensors("a")} == {0.0}


@pytest.mark.parametrize("granularity", ["token", "prefix"])
def test_padding_free_equals_padded(tmp_path, granularity):
    options = {"per_device_train_batch_size": 4}
    padded, _ = one_step(tmp_path, mixture(granularity=granularity), options)
    flat, _ = one_step(
        tmp_path, mixture(granularity=granularity), {**options, "padding_free": True, "max_length": None}
    )
    for key in ("loss", "aux_loss"):
        assert flat.logs[key] == pytest.approx(padded.logs[key], rel=1e-4), key
    for name, grad in padded.grads.items():
        torch.testing.assert_close(flat.grads[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_sequence_granularity_refuses_padding_free(tmp_path):
    with pytest.raises(ValueError, match="packed rows"):
        one_step(
            tmp_path,
            mixture(granularity="sequence"),
            {"per_device_train_batch_size": 4, "padding_free": True, "max_length": None},
        )


def test_gradient_checkpointing_through_the_trainer(tmp_path):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    plain, _ = one_step(tmp_path, mixture(), options)
    saved, _ = one_step(tmp_path, mixture(), {**options, "activation_checkpointing": True})
    assert plain.grads.keys() == saved.grads.keys()
    for name, grad in plain.grads.items():
        torch.testing.assert_close(saved.grads[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_training_leaves_the_base_as_it_was(tmp_path):
    model = mixture()
    base = model.get_base_model()
    before = {name: value.clone() for name, value in tiny_base().state_dict().items()}
    _, trainer = one_step(tmp_path, model, {"per_device_train_batch_size": 8, "learning_rate": 1e-2})
    assert "forward" not in base.__dict__
    model(torch.arange(6).view(1, 6))
    assert trainer.router_losses.records == []  # nothing is recorded after the training
    bare = model.unload()
    assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())


def test_mixed_precision_ends_with_the_training(tmp_path):
    model = mixture()
    one_step(tmp_path, model, {"bf16": True, "use_cpu": True})
    assert "forward" not in model.__dict__
    assert "_original_forward" not in model.__dict__


def test_domains_are_checked(tmp_path):
    without = Dataset.from_list([{"prompt": "x", "completion": "y"}])
    with pytest.raises(ValueError, match="no 'domain' column"):
        MoETrainer(
            mixture(),
            args=arguments(tmp_path),
            train_dataset=without,
            processing_class=tiny_tokenizer(),
            domain_coefficient=1.0,
        )
    unknown = Dataset.from_list([{"prompt": "x", "completion": "y", "domain": "law"}])
    with pytest.raises(ValueError, match="law is no expert; the experts are a, b"):
        MoETrainer(
            mixture(), args=arguments(tmp_path), train_dataset=unknown, processing_class=tiny_tokenizer()
        ).train()


def test_a_process_trains_on_one_device(tmp_path, caplog):
    """Of two that Trainer sees, and would put into threads of `nn.DataParallel`."""
    settings = arguments(tmp_path, use_cpu=True)
    assert settings.n_gpu < 2
    settings._n_gpu = 2
    rows = Dataset.from_list(ROWS)
    trainer = MoETrainer(mixture(), args=settings, train_dataset=rows, processing_class=tiny_tokenizer())
    assert trainer.args.n_gpu == 1
    assert trainer._train_batch_size == settings.per_device_train_batch_size
    assert "--num-processes" in caplog.text


def test_trainer_refuses_other_models(tmp_path):
    with pytest.raises(TypeError, match="use SFTTrainer"):
        MoETrainer(tiny_base(), args=arguments(tmp_path))


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


def test_a_training_without_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="8 rows do not fill one batch of 16"):
        run(tmp_path, rows=ROWS, per_device_train_batch_size=16, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="max_steps=0"):
        run(tmp_path, max_steps=0)


def test_what_cannot_be_saved_is_not_trained(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no card")

    monkeypatch.setattr("dylora_moe.model.model_card", broken)
    with pytest.raises(CheckpointError, match=r"could not be saved: no card\. Nothing was trained"):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_bases_own_auxiliary_loss_is_logged_apart(tmp_path):
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    own = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "router_aux_loss_coef": 0.5}
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**sizes, **own, num_local_experts=4, num_experts_per_tok=2))
    config = MoELoraConfig(expert_names=["a", "b"], r=2, target_modules=["q_proj"], balance_coefficient=1.0)
    common = {"report_to": "none", "bf16": False, "use_cpu": True, "max_steps": 1, "logging_steps": 1}
    rates = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "disable_tqdm": True}
    trainer = MoETrainer(
        DyLoraMoE.from_base(base, config),
        args=SFTConfig(output_dir=str(tmp_path), **common, **rates),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["base_aux_loss"] == pytest.approx(2, rel=0.2)  # about its experts per token
    assert logged["aux_loss"] == pytest.approx(logged["router/balance"], rel=1e-5)
    parts = logged["lm_loss"] + 0.5 * logged["base_aux_loss"] + logged["aux_loss"]
    assert logged["loss"] == pytest.approx(parts, rel=1e-4)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(logged["lm_loss"], rel=0.05)
