"""Mixtures of adapters that other people trained: each stays exactly the adapter it was."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig
from stock import assert_unchanged, logits, save_stock_adapter, snapshot, stock_logits
from tiny import SHAPES, tiny_base, tiny_mixture, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
# folder → decoder layers, rank, alpha, targets per layer, fan_in_fan_out as saved
REAL = {
    "gpt2_mycguo": (12, 8, 16, 3, False),
    "gpt2_tigrinya": (12, 8, 32, 3, True),
    "distilgpt2_niket": (6, 8, 16, 1, True),
}
IDS = torch.randint(2, 50, (2, 6), generator=torch.Generator().manual_seed(0))


def gpt2(layers: int) -> GPT2LMHeadModel:
    """GPT-2 in the width of the real adapters, random and with a small vocabulary (nobody adapts the embeddings)."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, vocab_size=50, n_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def adapters(shared_dir: Path) -> Path:
    folder = shared_dir / "adapters"
    if not folder.is_dir():
        pytest.skip(f"no real adapters at {folder}")
    return folder


@pytest.mark.parametrize("names", [("gpt2_mycguo", "gpt2_tigrinya"), ("distilgpt2_niket",)], ids="+".join)
def test_real_adapters_keep_what_is_theirs_and_compute_what_stock_peft_computes(names, adapters, tmp_path):
    layers = REAL[names[0]][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = DyLoraMoE.from_adapters(gpt2(layers), {name: str(adapters / name) for name in names})
    model.eval()
    assert model.expert_names == list(names)
    assert model.router_layer == layers // 4
    assert model.passes_per_step == 1 + (layers // 4) / layers
    base = gpt2(layers)
    model.save_pretrained(tmp_path)
    for name in names:
        _, rank, alpha, targets, saved_fan_in_fan_out = REAL[name]
        config = model.peft_config[name]
        assert (config.r, config.lora_alpha) == (rank, alpha)
        assert len(model.expert_tensors(name)) == 2 * targets * layers
        original = load_file(adapters / name / "adapter_model.safetensors")
        for key, _, parameter in model.expert_tensors(name):
            assert torch.equal(parameter, original[key])
            assert not parameter.requires_grad
        forced = logits(model, IDS, experts=name)
        assert not torch.equal(forced, logits(model, IDS, experts="base"))
        complaint = pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`")
        with contextlib.nullcontext() if saved_fan_in_fan_out else complaint:
            assert torch.equal(stock_logits(adapters / name, base, IDS), forced)
        with warnings.catch_warnings():  # the exported configuration needs no repair
            warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
            assert torch.equal(stock_logits(tmp_path / name, base, IDS), forced)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_adapter_of_more_layers_than_the_base_is_refused(adapters):
    base = gpt2(6)
    before = snapshot(base)
    with pytest.raises(
        CheckpointError, match=r"adapter_model.safetensors \(made for gpt2\): 36 tensors that"
    ) as caught:
        DyLoraMoE.from_adapters(base, {"big": str(adapters / "gpt2_tigrinya")})
    assert "transformer.h.10." in str(caught.value)
    assert_unchanged(base, before)


def test_adapter_of_fewer_layers_than_the_base_is_refused(adapters):
    """Its targets match all 12 layers but it brings tensors for 6: the rest would stay random."""
    base = gpt2(12)
    before = snapshot(base)
    message = r"adapter_model.safetensors \(made for distilgpt2\): 12 of 24 tensors missing, first .*transformer.h.10."
    with pytest.raises(CheckpointError, match=message):
        DyLoraMoE.from_adapters(base, {"small": str(adapters / "distilgpt2_niket")})
    assert_unchanged(base, before)


def test_adapter_of_fewer_layers_fits_where_it_says_so(adapters, tmp_path):
    folder = shutil.copytree(adapters / "distilgpt2_niket", tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.chmod(0o644)
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_to_transform": list(range(6))}))
    base = gpt2(12)
    expected = stock_logits(folder, base, IDS)
    model = DyLoraMoE.from_adapters(base, {"small": str(folder)}).eval()
    assert len(model.expert_tensors("small")) == 12
    assert torch.equal(logits(model, IDS, experts="small"), expected)


def adapter_zoo(folder: Path) -> dict[str, Path]:
    """Adapters with nothing in common."""
    configs = {
        "dora": LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "v_proj"]),
        "everywhere": LoraConfig(r=2, lora_alpha=7, use_rslora=True, target_modules="all-linear"),
        "pattern": LoraConfig(r=2, target_modules=r".*\.[13]\.mlp\.(up|down)_proj", rank_pattern={"up_proj": 5}),
        "ids": LoraConfig(r=4, target_modules=["embed_tokens"], lora_dropout=0.3),
        "head": LoraConfig(r=1, target_modules=["lm_head"], layers_to_transform=None),
    }
    return {name: save_stock_adapter(folder / name, config, seed=i) for i, (name, config) in enumerate(configs.items())}


def test_adapters_with_nothing_in_common_mix_and_come_back(tmp_path):
    zoo = adapter_zoo(tmp_path)
    model = DyLoraMoE.from_adapters(tiny_base(), {name: str(path) for name, path in zoo.items()}).eval()
    model.save_pretrained(tmp_path / "mixture")
    loaded = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=tiny_base())
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    for name, folder in zoo.items():
        expected = stock_logits(folder, tiny_base(), tokens())
        assert torch.equal(logits(model, tokens(), experts=name), expected), name
        assert torch.equal(stock_logits(tmp_path / "mixture" / name, tiny_base(), tokens()), expected), name


def test_imported_experts_are_frozen_unless_asked_for(tmp_path):
    folder = str(save_stock_adapter(tmp_path, LoraConfig(r=2, target_modules=["q_proj"])))
    frozen = DyLoraMoE.from_adapters(tiny_base(), {"sql": folder})
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["router.down", "router.up"]
    trainable = DyLoraMoE.from_adapters(tiny_base(), {"sql": folder}, trainable=True)
    assert all(tensor.tensor.requires_grad for tensor in trainable.expert_tensors("sql"))
    assert not any(p.requires_grad for p in trainable.get_base_model().model.embed_tokens.parameters())


def test_the_given_configuration_routes_and_the_adapters_name_the_experts(tmp_path):
    folders = {
        name: str(save_stock_adapter(tmp_path / name, LoraConfig(r=r, target_modules=["v_proj"]), seed=r))
        for name, r in (("sql", 2), ("math", 5))
    }
    config = MoELoraConfig(r=7, target_modules=["q_proj"], router_layer=0, top_k=1, granularity="sequence")
    model = DyLoraMoE.from_adapters(tiny_base(), folders, config)
    assert (model.expert_names, model.router_layer, model.moe_config.top_k) == (["sql", "math"], 0, 1)
    assert model.moe_config.granularity == "sequence"
    assert [model.peft_config[name].r for name in folders] == [2, 5]
    model.add_expert("late")
    assert model.peft_config["late"].r == 7


def test_base_by_path_is_named_in_the_checkpoint(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    folder = save_stock_adapter(tmp_path / "sql", LoraConfig(r=2, target_modules=["q_proj"]))
    model = DyLoraMoE.from_adapters(str(tmp_path / "base"), {"sql": str(folder)}).eval()
    model.save_pretrained(tmp_path / "mixture")
    loaded = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"))
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    config = json.loads((tmp_path / "mixture" / "sql" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["inference_mode"] is True


def test_an_adapter_joins_a_mixture_of_new_experts(tmp_path):
    folder = save_stock_adapter(tmp_path, LoraConfig(r=6, use_dora=True, target_modules=["q_proj", "down_proj"]))
    model = tiny_mixture()
    forced = {name: logits(model, tokens(), experts=name) for name in model.expert_names}
    model.add_expert("guest", folder)
    assert torch.equal(logits(model, tokens(), experts="guest"), stock_logits(folder, tiny_base(), tokens()))
    assert model.passes_per_step == 1.25  # the guest adapts layer 0, below the router
    assert not any(tensor.tensor.requires_grad for tensor in model.expert_tensors("guest"))
    for name, expected in forced.items():
        assert torch.equal(logits(model, tokens(), experts=name), expected)


RENAMINGS: dict[str, Callable[[str], str]] = {
    "as written": lambda key: key,
    "module.": lambda key: f"module.{key}",
    "_orig_mod.": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "wrapped twice": lambda key: f"base_model.model.{key}",
    "of the bare base": lambda key: key.removeprefix("base_model.model."),
    "with the adapter's name": lambda key: re.sub(r"(lora_[AB])\.", r"\1.default.", key),
    "with a name of its own": lambda key: re.sub(r"(lora_[AB])\.", r"\1.sql.", key),
    "magnitudes as modules": lambda key: re.sub(r"lora_magnitude_vector$", "lora_magnitude_vector.weight", key),
}


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("renaming", RENAMINGS)
def test_keys_are_read_as_stock_peft_reads_them(renaming, architecture, tmp_path):
    """What stock PEFT loads in full we load; what it would leave out without an error we refuse, showing the keys."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True)
    shape = {**SHAPES["llama"], "num_local_experts": 2} if architecture == "mixtral" else {}
    folder = save_stock_adapter(tmp_path, config, architecture, **shape)
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = stock_logits(folder, tiny_base(architecture, **shape), IDS)
    renamed = {RENAMINGS[renaming](key): tensor for key, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_loads = torch.equal(stock_logits(folder, tiny_base(architecture, **shape), IDS), expected)
    if renaming in ("as written", "with the adapter's name", "magnitudes as modules"):
        assert stock_loads  # or this test could pass by refusing everything
    if stock_loads:
        model = DyLoraMoE.from_adapters(tiny_base(architecture, **shape), {"red": str(folder)}).eval()
        assert torch.equal(logits(model, IDS, experts="red"), expected)
        return
    base = tiny_base(architecture, **shape)
    before = snapshot(base)
    with pytest.raises(CheckpointError) as caught:
        DyLoraMoE.from_adapters(base, {"red": str(folder)})
    first, second = sorted(set(renamed) - set(tensors))[:3], sorted(set(tensors) - set(renamed))[:3]
    assert f"The file has {', '.join(first)}; expected are {', '.join(second)}." in str(caught.value)
    assert_unchanged(base, before)


def test_names_that_the_base_maps_are_read(tmp_path, monkeypatch):
    """Older versions of transformers named modules otherwise, and a model class says how."""
    folder = save_stock_adapter(tmp_path, LoraConfig(r=2, target_modules=["q_proj"]))
    expected = stock_logits(folder, tiny_base(), IDS)
    tensors = load_file(folder / "adapter_model.safetensors")
    old = {key.replace("model.model.layers", "model.decoder.layers"): tensor for key, tensor in tensors.items()}
    save_file(old, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"The file has base_model.model.decoder.layers.0.*expected are"):
        DyLoraMoE.from_adapters(tiny_base(), {"red": str(folder)})
    monkeypatch.setattr(LlamaForCausalLM, "_checkpoint_conversion_mapping", {r"^decoder\.": "model."}, raising=False)
    assert torch.equal(stock_logits(folder, tiny_base(), IDS), expected)
    model = DyLoraMoE.from_adapters(tiny_base(), {"red": str(folder)}).eval()
    assert torch.equal(logits(model, IDS, experts="red"), expected)
