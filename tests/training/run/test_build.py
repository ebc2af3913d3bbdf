"""From a recipe to its examples: all experts' data, checked against the recipe's settings."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig
from dylora_moe.data.examples import Example
from dylora_moe.schema import RecipeError
from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.run.build import base_of, build_mixture, load_recipe_examples, load_tokenizer
from tinybase import save_tiny_base

GOOD = {"prompt": "p", "completion": "c"}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


def recipe(folder, row, **sections):
    (folder / "d.jsonl").write_text(json.dumps(row))
    expert = {"data": {"train": "d.jsonl", "test": "d.jsonl"}}
    return parse_recipe({"experts": {"law": expert}, **sections}, folder)


def test_data_must_go_with_the_settings(tmp_path):
    text, chat = {"text": "t"}, {"messages": CHAT}
    loss = {"eval": {"metric": "loss"}}
    for row, sections, message in (
        (chat, loss, r"^experts\.law\.data: chat messages need a chat template; set base\.chat: true"),
        (text, {}, r"^experts\.law\.data: eval\.metric=exact_match .* plain text .* set eval\.metric: loss"),
        (
            text,
            {**loss, "mixture": {"granularity": "sequence"}},
            r"granularity=sequence .* set mixture\.granularity: token",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe_examples(recipe(tmp_path, row, **sections))
    train, test = load_recipe_examples(recipe(tmp_path, text, **loss))
    assert train == {"law": test} == {"law": [Example("", "t", "law")]}
    train, test = load_recipe_examples(recipe(tmp_path, chat, base={"chat": True}, eval={"samples": 1}))
    assert len(train["law"]) == 2
    assert len(test) == 1


def test_experts_without_held_out_data_give_none(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(GOOD))
    experts = {"law": {"data": {"train": "d.jsonl"}}, "when": {"data": {"skill": "date", "train": 2, "test": 2}}}
    train, test = load_recipe_examples(parse_recipe({"experts": experts}, tmp_path))
    assert list(train) == ["law", "when"]
    assert [example.domain for example in test] == ["when", "when"]


def saved_mixture(folder, rows=None):
    save_tiny_base(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    if rows is not None:
        base.resize_token_embeddings(rows, mean_resizing=False)
    config = MoELoraConfig(expert_names=["law"], r=2, target_modules=["q_proj"])
    mixture = DyLoraMoE.from_base(base, config).eval()
    mixture.save_pretrained(folder / "mixture")
    return mixture


def test_start_names_a_base_that_has_moved(tmp_path):
    saved_mixture(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    started = recipe(tmp_path, GOOD, start=str(tmp_path / "mixture"))
    for call in (load_tokenizer, base_of):
        with pytest.raises(CheckpointError, match=r"moe_config.json names the base .*cannot.*base\.model in"):
            call(started)
    told = recipe(tmp_path, GOOD, start=str(tmp_path / "mixture"), base={"model": str(tmp_path / "elsewhere")})
    assert base_of(told).config.vocab_size == 257


def test_start_brings_its_resized_vocabulary(tmp_path):
    mixture = saved_mixture(tmp_path, rows=260)
    started = recipe(tmp_path, GOOD, start=str(tmp_path / "mixture"))
    base = base_of(started)
    assert torch.equal(base.lm_head.weight, mixture.get_base_model().lm_head.weight)
    ids = torch.tensor([[3, 258, 259]])
    again = build_mixture(started, base).eval()
    assert torch.equal(again(ids, experts="law").logits, mixture(ids, experts="law").logits)
