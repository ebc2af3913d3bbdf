"""Where experts may sit: inside the decoder, where routing reaches them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.base.placement import BEFORE_THE_LAYERS, UNREACHABLE, Placement
from families import PLAIN as TEXT
from tinybase import tiny_base

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION, image_size=8, patch_size=4)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=63)
    ).eval()


def images() -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 23).view(2, 10)
    ids[:, 1:5] = 63
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def test_the_place_of_every_kind_of_module():
    base = llava()
    placement = Placement.of(base)
    vision = next(path for path, _ in base.named_modules() if "vision_tower" in path and path.endswith("q_proj"))
    places = {
        "model.language_model.layers.2.self_attn.q_proj": 2,
        "model.language_model.embed_tokens": BEFORE_THE_LAYERS,
        "lm_head": 4,
        vision: UNREACHABLE,
        "model.multi_modal_projector.linear_1": UNREACHABLE,
    }
    assert {path: placement.layer_of(path) for path in places} == places


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_new_experts_stay_inside_the_decoder(targets):
    base = llava()
    with torch.no_grad():
        bare = base(**images()).logits
    config = MoELoraConfig(num_experts=2, r=4, target_modules=targets, init_lora_weights=False)
    model = DyLoraMoE.from_base(base, config).eval()
    assert all(layer.routing_name.startswith("model.language_model.layers.") for layer in model.routed_layers)
    with torch.no_grad():
        assert torch.equal(model(**images(), experts="base").logits, bare)
        assert not torch.equal(model(**images()).logits, bare)


def test_an_adapter_outside_the_decoder_is_refused_with_the_pattern_to_use(tmp_path):
    base = llava()
    get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path)
    with torch.no_grad():
        bare = base(**images()).logits
    with pytest.raises(
        ValueError, match=r"'a' adapts 4 modules outside the decoder, first model\.vision_tower"
    ) as error:
        DyLoraMoE.from_adapters(base, {"a": str(tmp_path)})
    with torch.no_grad():
        assert torch.equal(base(**images()).logits, bare)  # as it was
    pattern = str(error.value).split("target_modules=")[1].removesuffix(".")
    config = LoraConfig(r=4, target_modules=eval(pattern))  # it can be pasted
    adapter = get_peft_model(copy.deepcopy(base), config)
    adapter.save_pretrained(tmp_path / "inside")
    DyLoraMoE.from_adapters(base, {"a": str(tmp_path / "inside")})


def test_models_that_are_no_decoder_are_refused_by_name():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        DyLoraMoE.from_base(t5, MoELoraConfig(num_experts=2, target_modules=["q", "v"]))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is no causal language model"):
        DyLoraMoE.from_base(LlamaForSequenceClassification(LlamaConfig(**TEXT)))


def test_a_layer_that_nobody_told_anything_is_its_base():
    """Never PEFT's sum of all experts."""
    config = MoELoraConfig(expert_names=["a", "b"], r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = DyLoraMoE.from_base(tiny_base(), config).eval()
    layer, x = model.routed_layers[0], torch.randn(2, 3, model.config.hidden_size)
    assert torch.equal(layer(x), layer.base_layer(x))
