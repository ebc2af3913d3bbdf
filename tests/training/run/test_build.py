"""From a recipe to its examples: all experts' data, checked against the recipe's settings."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig
from dylora_moe.data.examples import Example, encode
from dylora_moe.schema import RecipeError
from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.run.build import (
    base_of,
    base_title,
    build_mixture,
    load_recipe_examples,
    load_tokenizer,
    loading_options,
)
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


def test_loading_options_of_the_base(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    given = {"model": "a/b", "revision": "v1", "dtype": "bfloat16", "attn_implementation": "eager"}
    given |= {"device_map": "auto", "trust_remote_code": True, "quantization": "4bit"}
    skill = {"sql": {"data": {"skill": "sql"}}}
    options = loading_options(parse_recipe({"base": given, "experts": skill}))
    four = options.pop("quantization_config")
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == (True, "nf4", torch.bfloat16)
    expected = {key: given[key] for key in ("revision", "attn_implementation", "device_map", "trust_remote_code")}
    assert options == {**expected, "dtype": torch.bfloat16}
    eight = loading_options(parse_recipe({"base": {"quantization": 8}, "experts": skill}))["quantization_config"]
    assert eight.load_in_8bit
    assert loading_options(parse_recipe({"experts": skill})) == {"dtype": torch.float32}


def test_a_recipe_without_base_says_which_it_takes():
    assert (
        base_title(parse_recipe({"experts": {"a": {"data": {"skill": "sql"}}}})) == "embedded (SmolLM2-135M-Instruct)"
    )


def test_a_length_beyond_the_positions_of_the_base_is_refused(base):
    content = {"base": {"model": base}, "experts": {"a": {"data": {"skill": "sql"}}}, "train": {"max_length": 257}}
    with pytest.raises(RecipeError, match=r"^train\.max_length=257: .* has 256 positions"):
        load_tokenizer(parse_recipe(content))
    content["train"]["max_length"] = 256
    assert load_tokenizer(parse_recipe(content)).model_max_length == 256


def test_a_chat_template_by_its_path(base, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    content = {"base": {"model": base, "chat": True, "chat_template": str(file)}}
    content["experts"] = {"a": {"data": {"skill": "sql"}}}
    tokenizer = load_tokenizer(parse_recipe(content))
    example = Example([{"role": "user", "content": "ab"}], "cd")
    assert encode(example, tokenizer, chat=True)[0] == tokenizer("abcd", add_special_tokens=False).input_ids


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
