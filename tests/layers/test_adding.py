"""Adding an adapter takes no longer for those that are there, and changes nothing of what PEFT makes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from peft.tuners.lora import LoraLayer

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.layers.adding import out_of_sight
from tinybase import tiny_base

CONFIGS = {
    "red": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "green": LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True),
    "blue": LoraConfig(r=1, target_modules=["v_proj", "up_proj"], lora_dropout=0.1, lora_bias=True),
    "amber": LoraConfig(r=2, target_modules=["embed_tokens", "up_proj"], rank_pattern={"up_proj": 5}),
}


def test_what_is_made_is_what_peft_makes():
    base = tiny_base()
    made = []
    for hides in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), copy.deepcopy(CONFIGS["red"]), "red")
        bare = model.get_base_model()
        with out_of_sight(bare) as hide:
            for name in ("green", "blue", "amber"):
                if hides:
                    hide()
                model.add_adapter(name, copy.deepcopy(CONFIGS[name]))
        made.append(model)
    stock, ours = made
    parts, same = list(stock.named_parameters()), list(ours.named_parameters())
    assert [(name, part.requires_grad) for name, part in parts] == [(name, part.requires_grad) for name, part in same]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(parts, same, strict=True))
    assert [path for path, _ in stock.named_modules()] == [path for path, _ in ours.named_modules()]
    x = torch.arange(6)[None]
    for name in CONFIGS:
        for model in made:
            model.set_adapter(name)
        assert torch.equal(stock.eval()(x).logits, ours.eval()(x).logits)


@pytest.mark.parametrize("added_later", [False, True])
def test_peft_walks_over_no_more_modules_for_the_last_expert(monkeypatch, added_later):
    walked = []
    inject = LoraModel.inject_adapter

    def counted(self, model, *args, **kwargs):
        walked.append(sum(1 for _ in model.named_modules()))
        return inject(self, model, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "inject_adapter", counted)
    names = [f"e{i}" for i in range(7)]
    config = MoELoraConfig(expert_names=names[:2] if added_later else names, r=2, router_layer=1)
    model = DyLoraMoE.from_base(tiny_base(), config)
    for name in names[2:] if added_later else []:
        model.add_expert(name)
    assert len(walked) == 7
    assert len(set(walked[1:])) == 1
    layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
    assert [list(layer.lora_A), list(layer.lora_dropout)] == [names, names]


def test_a_refused_expert_leaves_the_others_where_they_were():
    model = DyLoraMoE.from_base(tiny_base(), MoELoraConfig(expert_names=["red", "green"], r=2, router_layer=1))
    before = {name: part.clone() for name, part in model.named_parameters()}
    with pytest.raises(ValueError, match="no_such_layer"):
        model.add_expert("blue", LoraConfig(r=2, target_modules=["no_such_layer"]))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
