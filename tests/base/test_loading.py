"""A base that accelerate dispatched; and that transformers and PEFT have nothing to complain of."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import pipeline

from dylora_moe import DyLoraMoE, MoELoraConfig, enable_routing
from tinybase import save_tiny_base, tiny_base, tiny_tokenizer

IDS = torch.arange(24).view(2, 12)


def mixture(base) -> DyLoraMoE:
    torch.manual_seed(1)
    config = MoELoraConfig(expert_names=["a", "b"], r=4, target_modules="all-linear", init_lora_weights=False)
    return DyLoraMoE.from_base(base, config)


def test_hooks_of_a_dispatched_base_do_not_bypass_the_routing():
    parts = [
        "model.embed_tokens",
        "model.rotary_emb",
        "model.norm",
        "lm_head",
        *(f"model.layers.{i}" for i in range(4)),
    ]
    places = dict.fromkeys(parts, "cpu")
    hooked = mixture(dispatch_model(tiny_base(), places, main_device="cpu", force_hooks=True))
    plain = mixture(tiny_base())
    assert "forward" in hooked.routed_layers[0].base_layer.__dict__
    for model in (hooked, plain):
        model(IDS, labels=IDS).loss.backward()
    for (name, left), right in zip(hooked.named_parameters(), plain.parameters(), strict=True):
        if right.grad is not None:
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_an_offloaded_base_is_refused():
    with pytest.raises(ValueError, match="is offloaded to the CPU or disk"):
        mixture(cpu_offload(tiny_base(), execution_device="cpu"))


class Subclass(DyLoraMoE):
    """Of a user's own."""


@pytest.mark.parametrize(
    "build",
    [
        lambda: mixture(tiny_base()),
        lambda: Subclass.from_base(tiny_base(), MoELoraConfig(num_experts=2, r=4, target_modules="all-linear")),
        lambda: enable_routing(
            get_peft_model(tiny_base(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        ),
    ],
    ids=["mixture", "subclass", "enable_routing"],
)
def test_a_pipeline_takes_it_without_a_word(build):
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        answer = pipeline("text-generation", model=build(), tokenizer=tiny_tokenizer())
    finally:
        logger.removeHandler(handler)
    assert [message for message in heard if "not supported" in message] == []
    assert answer("Once", max_new_tokens=2)[0]["generated_text"].startswith("Once")


def test_building_and_loading_warn_of_nothing(tmp_path):
    base = save_tiny_base(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        built = DyLoraMoE.from_base(base, MoELoraConfig(num_experts=2, r=4, target_modules="all-linear"))
        built.add_expert("late")
        built.save_pretrained(tmp_path / "mixture")
        DyLoraMoE.from_pretrained(str(tmp_path / "mixture"))
