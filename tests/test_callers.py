"""Stock `transformers.Trainer` and TRL's trainers take a mixture for the PeftModel that it is."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch.nn.functional import log_softmax, logsigmoid
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_pt_utils import LabelSmoother
from trl import (  # pyright: ignore[reportPrivateImportUsage]
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.trainer.utils import use_adapter

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig
from dylora_moe.callers import AdapterConfigs, check_trainer, ignored_at_inference, share_of_step
from dylora_moe.experts.expert_set import NEW
from tinybase import tiny_base, tiny_tokenizer

GENERATOR = torch.Generator().manual_seed(0)
ROWS: list[dict[str, Any]] = [
    {"input_ids": ids, "labels": ids, "attention_mask": [1] * 12}
    for ids in torch.randint(1, 257, (16, 12), generator=GENERATOR).tolist()
]
PREFERENCES = Dataset.from_list(
    [{"prompt": f"ask {i}", "chosen": " yes" * (1 + i % 3), "rejected": " no"} for i in range(4)]
)
LABELLED = Dataset.from_list(
    [{"prompt": f"ask {i}", "completion": " yes" * (1 + i % 3), "label": bool(i % 2)} for i in range(4)]
)
PROMPTS = PREFERENCES.select_columns(["prompt"])


def mixture(base: Any = None, **options: Any) -> DyLoraMoE:
    torch.manual_seed(1)
    settings = {"expert_names": ["a", "b"], "r": 4, "target_modules": ["q_proj", "down_proj"], **options}
    return DyLoraMoE.from_base(tiny_base() if base is None else base, MoELoraConfig(**settings))


def mixtral(**config: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    own = {"num_key_value_heads": 2, "num_local_experts": 4, "router_aux_loss_coef": 1.0}
    return MixtralForCausalLM(MixtralConfig(**sizes, **tokens, **own, **config))


def stock_trainer(model: DyLoraMoE, folder: Any, train: int = 16, evaluate: int = 8, **options: Any) -> Trainer:
    hooks = {key: options.pop(key) for key in ("compute_metrics", "callbacks") if key in options}
    settings = {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=ROWS[:train],  # pyright: ignore[reportArgumentType]  # a list is a dataset to Trainer
        eval_dataset=ROWS[-evaluate:],  # pyright: ignore[reportArgumentType]  # as above
        data_collator=default_data_collator,
        **hooks,
    )


def tensors(model: DyLoraMoE) -> dict[str, torch.Tensor]:
    state = model.state()
    experts = {f"{n}/{k}": t for n, adapter in state.experts.items() for k, t in adapter.tensors.items()}
    return {key: value.clone() for key, value in {**experts, **state.router}.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


# ---------------------------------------------------------------------- Trainer


def test_the_best_model_is_loaded_at_the_end(tmp_path, caplog):
    model = mixture()
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    rate = {"learning_rate": 0.3, "lr_scheduler_type": "constant"}  # soon overfits its two rows
    trainer = stock_trainer(model, tmp_path, train=2, max_steps=4, load_best_model_at_end=True, **every, **rate)
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        trainer.train()
    transformers.utils.logging.disable_propagation()
    best = str(trainer.state.best_model_checkpoint)
    assert not best.endswith("-4"), "the last one is the best: the test would compare nothing"
    assert "adapter" not in caplog.text
    assert_same(tensors(model), tensors(DyLoraMoE.from_pretrained(best, base=tiny_base())))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def trainer(folder, steps, prepared=True):
        model = mixture()
        model.add_expert("late")
        if prepared:
            model.freeze_expert("b")
        return stock_trainer(model, folder, max_steps=steps, save_steps=2, lr_scheduler_type="constant")

    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trainer(tmp_path / "halves", 2).train()
    halves = trainer(tmp_path / "halves", 4, prepared=False)
    halves.model.start_routing()
    halves.train(resume_from_checkpoint=True)
    assert halves.model.expert_states["late"] == NEW
    assert halves.model.frozen_experts == {"b"}
    assert_same(tensors(halves.model), tensors(whole.model))
    before = tensors(trainer(tmp_path / "new", 1).model)
    moved = {name.split("/")[0] for name, value in before.items() if not torch.equal(value, tensors(whole.model)[name])}
    assert moved == {"a", "down", "up"}


def test_another_mixtures_checkpoint_is_not_resumed(tmp_path):
    stock_trainer(mixture(), tmp_path, max_steps=1, save_steps=1).train()
    other = mixture(expert_names=["a", "c"])
    before = tensors(other)
    with pytest.raises(CheckpointError, match="a mixture of a, b; this one has the experts a, c"):
        stock_trainer(other, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert_same(tensors(other), before)


def test_only_a_trainers_checkpoints_hold_what_trainer_looks_for(tmp_path):
    model = mixture()
    for folder in ("checkpoint-3", "checkpoint", "final"):
        model.save_pretrained(tmp_path / folder)
        model.save_pretrained(tmp_path / folder)  # in the place of the first
        assert (tmp_path / folder / "adapter_model.safetensors").exists() is (folder == "checkpoint-3")
        assert_same(tensors(DyLoraMoE.from_pretrained(str(tmp_path / folder), base=tiny_base())), tensors(model))


def test_save_model_writes_a_checkpoint(tmp_path):
    model = mixture()
    stock_trainer(model, tmp_path / "run").save_model(str(tmp_path / "saved"))
    assert_same(tensors(DyLoraMoE.from_pretrained(str(tmp_path / "saved"), base=tiny_base())), tensors(model))


@pytest.mark.parametrize("kind", ["llama", "llama of its own mind", "mixtral"])
def test_predictions_are_the_logits(kind, tmp_path):
    base: Any = mixtral(output_router_logits=True) if kind == "mixtral" else tiny_base()
    if kind == "llama of its own mind":
        base.config.keys_to_ignore_at_inference = ["hidden_states"]
        base.config.output_hidden_states = True
    seen = []

    def accuracy(prediction):
        seen.append(prediction.predictions)
        return {"accuracy": float((prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    model = mixture(base)
    trainer = stock_trainer(model, tmp_path, compute_metrics=accuracy)
    assert "eval_accuracy" in trainer.evaluate()
    expected = model(torch.tensor([row["input_ids"] for row in ROWS[-8:]])).logits.detach().numpy()
    for found in (*seen, trainer.predict(ROWS[-8:]).predictions):  # pyright: ignore[reportArgumentType]  # as above
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_accumulation_does_not_change_the_z_loss(architecture, tmp_path):
    """Eight rows at once or two at a time: what is linear in the tokens has the same gradient."""

    def gradient(rows: int, z: float) -> torch.Tensor:
        base: Any = tiny_base() if architecture == "llama" else mixtral()
        model, found = mixture(base, balance_loss="none", z_loss_coefficient=z), []

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, *args, **kwargs):
                found.append(model.router.up.grad.clone())

        step = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows, "max_steps": 1}
        stock_trainer(model, tmp_path, train=8, max_grad_norm=0, callbacks=[Keep()], **step).train()
        return found[0]

    at_once, in_parts = (gradient(rows, 1.0) - gradient(rows, 0.0) for rows in (8, 2))
    assert at_once.norm() > 1e-3
    torch.testing.assert_close(in_parts, at_once, rtol=1e-3, atol=1e-5)


def test_label_smoothing_of_stock_trainer(tmp_path):
    model = mixture()
    trainer = stock_trainer(model, tmp_path, label_smoothing_factor=0.1, per_device_eval_batch_size=8)
    ids = torch.tensor([row["input_ids"] for row in ROWS[-8:]])
    expected = LabelSmoother(0.1)({"logits": model.eval()(ids).logits}, ids, shift_labels=True)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


# ---------------------------------------------------------------------- TRL

QUICK = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "disable_tqdm": True,
    "save_strategy": "no",
    "activation_checkpointing": False,
}


def lengths(completions, **_: Any) -> list[float]:
    return [float(i) for i in range(len(completions))]


def build(name: str, model: DyLoraMoE, folder: Any) -> Any:
    online = {"reward_funcs": lengths, "train_dataset": PROMPTS}
    generating = {"beta": 0.1, "num_generations": 2, "max_completion_length": 4}
    classes: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
        "dpo": (DPOTrainer, DPOConfig, {"train_dataset": PREFERENCES}, {}),
        "kto": (KTOTrainer, KTOConfig, {"train_dataset": LABELLED}, {}),
        "grpo": (GRPOTrainer, GRPOConfig, online, generating),
        "rloo": (RLOOTrainer, RLOOConfig, online, generating),
        "reward": (RewardTrainer, RewardConfig, {"train_dataset": PREFERENCES}, {}),
    }
    if name in ("orpo", "cpo"):
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        classes["orpo"] = (ORPOTrainer, ORPOConfig, {"train_dataset": PREFERENCES}, {})
        classes["cpo"] = (CPOTrainer, CPOConfig, {"train_dataset": PREFERENCES}, {})
    trainer, config, data, options = classes[name]
    return trainer(model, args=config(str(folder), **QUICK, **options), processing_class=tiny_tokenizer(), **data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", "rloo", "orpo", "cpo"])
def test_trains_with_the_base_as_reference(name, architecture, tmp_path):
    base: Any = tiny_base() if architecture == "llama" else mixtral()
    model = mixture(base, init_lora_weights=False)
    before = tensors(model)
    trainer = build(name, model, tmp_path)
    trainer.train()
    assert model.expert_names == ["a", "b"]
    after = tensors(model)
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]
    assert all(parameter.grad is None for parameter in model.parameter_groups()["frozen"])
    if architecture == "mixtral" and name in ("dpo", "kto"):  # the base's own, about its number of experts per token
        assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(2, rel=0.1)


@pytest.mark.filterwarnings("ignore")
def test_loss_of_dpo_against_the_formula(tmp_path):
    model, bare = mixture(init_lora_weights=False), tiny_base()
    trainer = build("dpo", model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))

    def log_probability(logits: torch.Tensor) -> torch.Tensor:
        scores = log_softmax(logits[:, :-1], -1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (scores * batch["completion_mask"][:, 1:]).sum(-1)

    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        policy, reference = log_probability(model(**inputs).logits), log_probability(bare(**inputs).logits)
        loss = trainer.compute_loss(model, batch)
    chosen, rejected = (policy - reference).chunk(2)
    assert float((policy - reference).abs().min()) > 1e-3, "policy and reference are the same: nothing is compared"
    torch.testing.assert_close(loss, -logsigmoid(0.1 * (chosen - rejected)).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_another_mixture_as_reference(tmp_path):
    other = mixture(init_lora_weights=False).eval()
    ids = torch.arange(1, 9)[None]
    expected = other(ids).logits
    options = {"ref_model": other.get_base_model(), "train_dataset": PREFERENCES, "processing_class": tiny_tokenizer()}
    trainer = DPOTrainer(mixture(), args=DPOConfig(str(tmp_path), **QUICK), **options)
    trainer.train()
    reference: Any = trainer.ref_model
    assert torch.equal(reference(ids).logits, expected)


def test_the_reference_of_a_trained_mixture_is_announced(caplog):
    for init, announced in ((True, False), (False, True)):
        model = mixture(init_lora_weights=init).eval()
        caplog.clear()
        model.add_adapter("ref", model.peft_config["default"])
        assert ("the reference is the bare base" in caplog.text) is announced
        assert "ref" not in model.peft_config
        ids = torch.arange(1, 9)[None]
        with use_adapter(model, None):
            assert torch.equal(model(ids).logits, tiny_base().eval()(ids).logits)


def test_reward_trainer_is_refused(tmp_path):
    model = mixture()
    model.config.num_labels = 1
    with pytest.raises(ValueError, match="train the reward model as a stock PeftModel"):
        build("reward", model, tmp_path)


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_what_orpo_and_cpo_cannot_do_is_refused(name):
    with pytest.raises(ValueError, match="output_router_logits=False"):
        mixture(mixtral(output_router_logits=True)).add_model_tags(["trl", name])
    with pytest.raises(ValueError, match='granularity="token"'):
        mixture(granularity="sequence").add_model_tags(["trl", name])


def test_trainers_that_leave_the_routers_losses_out_are_warned_of(caplog):
    config: Any = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    for tags, router_loss, warned in (
        (["trl", "sft"], True, True),
        (["trl", "sft"], False, False),
        (["trl", "sft", "dylora-moe"], True, False),
        ("mine", True, False),
    ):
        caplog.clear()
        check_trainer(tags, config, False, router_loss)
        assert ("have no part in it" in caplog.text) is warned


# ---------------------------------------------------------------------- parts


def test_configurations_answer_for_the_whole_without_listing_it():
    model = mixture()
    assert list(model.peft_config) == ["a", "b"]
    assert model.peft_config["default"] is model.moe_config
    assert "default" not in model.peft_config
    with pytest.raises(KeyError, match="other"):
        model.peft_config["other"]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.peft_config["default"] is again.moe_config
    model.rename_expert("a", "c")
    assert isinstance(model.peft_config, AdapterConfigs)
    assert list(model.peft_config) == ["c", "b"]


def test_ignored_fields_are_the_bases_and_ours():
    assert ignored_at_inference(SimpleNamespace(), ["x"]) == ["past_key_values", "x"]
    own = SimpleNamespace(keys_to_ignore_at_inference=["past_key_values", "mems"])
    assert ignored_at_inference(own, ["x", "mems"]) == ["past_key_values", "mems", "x"]
    assert own.keys_to_ignore_at_inference == ["past_key_values", "mems"]
    ignored = json.loads(json.dumps(mixture().config.keys_to_ignore_at_inference))
    assert {"past_key_values", "lm_loss", "aux_loss", "balance_loss", "base_aux_loss"} < set(ignored)


def test_a_micro_batchs_share_counts_the_labels_that_have_a_prediction():
    labels = torch.tensor([[5, 6, -100], [-100, 7, 8]])
    assert float(share_of_step(labels, 12)) == pytest.approx(3 / 12)
    assert float(share_of_step(labels, torch.tensor(3))) == 1.0


def test_a_sequence_classifier_is_no_base():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    base = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises((TypeError, ValueError), match="causal language model"):
        mixture(base)
