"""Settings that exclude one another are refused with the reason, before anything is loaded."""

from __future__ import annotations

import json

import pytest

from dylora_moe.schema import RecipeError
from dylora_moe.training.recipe.recipe import parse_recipe

DATA = {"skill": "json", "train": 4, "test": 1}


def recipe(**changes) -> dict:
    return {"experts": {"a": {"data": DATA}, "b": {"data": DATA}}, **changes}


CASES = [
    (recipe(train={"packing": True}, mixture={"granularity": "sequence"}), r"^train\.packing: .*granularity: token"),
    (recipe(train={"padding_free": True}, mixture={"granularity": "sequence"}), r"^train\.padding_free: .*packed row"),
    (
        recipe(train={"deepspeed": {"zero_optimization": {"stage": 3}}, "gradient_checkpointing": True}),
        r"^train\.deepspeed: under ZeRO stage 3.*Use stage 2",
    ),
    (recipe(train={"torch_compile": True, "activation_checkpointing": True}), r"^train\.torch_compile: .*Keep one"),
    (recipe(train={"gradient_checkpointing_kwargs": {"use_reentrant": True}}), r"use_reentrant: true cannot see"),
    (recipe(train={"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}), r"FULL_STATE_DICT"),
    (recipe(train={"fsdp_config": {"version": 1}}), r"^train\.fsdp_config: FSDP 1"),
    (recipe(train={"label_smoothing_factor": 0.1, "loss_type": "dft"}), r"^train\.label_smoothing_factor"),
    (recipe(train={"eval_strategy": "steps"}), r"^train\.eval_strategy: .*train\.validation"),
    (recipe(train={"validation": 3}), r"^train\.validation: .*eval_strategy"),
    (recipe(train={"early_stopping_patience": 3}), r"^train\.early_stopping_patience: .*load_best_model_at_end"),
    (
        recipe(train={"report_to": ["tensorboard", "swanlab"]}),
        r"^train\.report_to: swanlab is not .*install swanlab",
    ),
    (recipe(experts={"a": {"data": DATA, "frozen": True}}), r"^experts: none has data and may be trained"),
    (recipe(experts={"a": {}}, train={"method": "router"}), r"^train\.method: the router learns from examples"),
    (recipe(train={"method": "router"}), r"^train\.method: .*new ones do nothing yet"),
    (recipe(experts={"stages": {"data": DATA}}), r"^experts\.stages: a run's folder has an entry of this name"),
    (recipe(train={"save_only_model": True}), r"^train\.save_only_model: .*cannot be resumed exactly"),
    (recipe(experts={"a": {"data": DATA}, "b": {}}, train={"method": "expert", "expert": "b"}), r"^experts\.b: "),
    (recipe(eval={"baseline": True}, start="runs/x"), r"^eval\.baseline: "),
    (recipe(train={"method": "expert"}), r"^train: expert=None with `method: expert`"),
    (recipe(train={"expert": "a"}), r"^train: expert='a' with `method: joint`"),
    (recipe(train={"method": "expert", "expert": "c"}), r"^train\.expert: no expert 'c' in `experts`"),
    (
        recipe(train={"method": "expert", "expert": "a", "domain_coefficient": 1}),
        r"domain_coefficient is for the router",
    ),
    (recipe(train={"two_phase": {}, "lr_scheduler_type": "cosine"}), r"^train: two_phase and lr_scheduler_type"),
    (recipe(train={"two_phase": {"seeding": 2}}), r"^train\.two_phase: seeding=2"),
    (recipe(train={"two_phase": {"sedding": 0.5}}), r"^train\.two_phase\.sedding: .* Did you mean 'seeding'\?"),
    (recipe(train={"temperature_start": 0}), r"temperature_start=0: must be greater than 0"),
    (
        recipe(train={"method": "staged", "expert_steps": 1, "router_steps": 1, "max_steps": 3}),
        r"max_steps is not used",
    ),
    (recipe(experts={"a": {"data": DATA, "adapter": "x/y", "lora": {"r": 2}}}), r"^experts\.a: lora=.* beside adapter"),
    (recipe(start="runs/x", mixture={"r": 4}), r"^mixture\.r: decided by the mixture in `start`"),
]


@pytest.mark.parametrize(("content", "message"), CASES, ids=[message[:40] for _, message in CASES])
def test_refused_with_the_reason(content, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(content)


def test_zero_3_in_a_file_is_seen(tmp_path):
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(RecipeError, match="ZeRO stage 3"):
        parse_recipe(recipe(train={"deepspeed": str(file), "activation_checkpointing": True}))
    parse_recipe(recipe(train={"deepspeed": str(file)}))


@pytest.mark.parametrize(
    "content",
    [
        recipe(train={"packing": True}),
        recipe(train={"torch_compile": True}),
        recipe(train={"deepspeed": {"zero_optimization": {"stage": 2}}, "activation_checkpointing": True}),
        recipe(train={"validation": 2, "eval_strategy": "epoch"}),
        recipe(train={"two_phase": {"seeding": 0.5}}),
        recipe(experts={"a": {"data": DATA}, "b": {}}),
    ],
)
def test_each_alone_is_fine(content):
    parse_recipe(content)
