"""What must be refused, or must not leak, when a mixture is built, changed and saved in unusual ways."""

from __future__ import annotations

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig, Router, gradient_report
from dylora_moe.experts.expert_set import NEW
from tiny import tiny_mixture, tokens
from tinybase import tiny_base


def config(**options) -> MoELoraConfig:
    return MoELoraConfig(**{"expert_names": ["red", "green"], "r": 2, "target_modules": ["q_proj"], **options})


def test_a_base_that_carries_adapters_is_refused():
    base = tiny_base()
    mixture = DyLoraMoE.from_base(base, config())
    with pytest.raises(ValueError, match="carries adapters already"):
        DyLoraMoE.from_base(base, config(expert_names=["law"]))
    DyLoraMoE.from_base(mixture.unload(), config(expert_names=["law"]))
    stock = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries adapters already"):
        DyLoraMoE.from_base(stock.base_model.model, config())


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_k", 9), ("top_k", 0), ("top_k", -1), ("train_top_k", 0), ("temperature", 0.0), ("granularity", "x")],
)
def test_settings_stay_checked_after_construction(key, value):
    mixture = DyLoraMoE.from_base(tiny_base(), config())
    before = getattr(mixture.moe_config, key)
    with pytest.raises(ValueError, match=key):
        setattr(mixture.moe_config, key, value)
    assert getattr(mixture.moe_config, key) == before
    mixture.moe_config.top_k = 1
    assert mixture.moe_config.top_k == 1


def test_two_mixtures_do_not_share_a_configuration():
    shared = config()
    one, two = DyLoraMoE.from_base(tiny_base(), shared), DyLoraMoE.from_base(tiny_base(), shared)
    one.add_expert("law")
    assert shared.expert_names == two.moe_config.expert_names == ["red", "green"]


def test_from_adapters_keeps_the_given_lora_fields(tmp_path):
    DyLoraMoE.from_base(tiny_base(), config()).export_expert("red", tmp_path / "red")
    given = config(expert_names=["x"], use_rslora=True, lora_dropout=0.1, layers_to_transform=[2, 3])
    mixture = DyLoraMoE.from_adapters(tiny_base(), {"red": str(tmp_path / "red")}, given)
    mixture.add_expert("new")
    new = mixture.lora_config("new")
    assert (new.use_rslora, new.lora_dropout) == (True, 0.1)
    assert {t.key.split(".")[4] for t in mixture.expert_tensors("new")} == {"2", "3"}


def test_an_index_of_positions_beside_an_expert_on_the_head():
    mixture = tiny_mixture(target_modules=["q_proj", "lm_head"]).eval()
    with pytest.raises(ValueError, match="logits_to_keep as a tensor"):
        mixture(tokens(), logits_to_keep=torch.tensor([1, 3]))
    without = tiny_mixture().eval()
    full = without(tokens()).logits
    torch.testing.assert_close(without(tokens(), logits_to_keep=torch.tensor([1, 3])).logits, full[:, [1, 3]])


def test_a_failed_build_leaves_the_base_as_it_was():
    base = tiny_base()
    names, trainable = [n for n, _ in base.named_modules()], [p.requires_grad for p in base.parameters()]
    good, bad = LoraConfig(r=2, target_modules=["q_proj"]), LoraConfig(r=2, target_modules=["nowhere"])
    with pytest.raises(ValueError, match="nowhere"):
        DyLoraMoE(base, config(), experts={"red": good, "green": bad})
    assert [n for n, _ in base.named_modules()] == names
    assert [p.requires_grad for p in base.parameters()] == trainable
    DyLoraMoE.from_base(base, config())


def test_saving_into_the_current_folder(tmp_path, monkeypatch):
    mixture = DyLoraMoE.from_base(tiny_base(), config())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    mixture.save_pretrained(".")
    mixture.remove_expert("green")
    mixture.save_pretrained(".", save_function=torch.save)
    assert sorted(os.listdir(".")) == ["README.md", "moe_config.json", "notes.txt", "red", "router.safetensors"]
    assert DyLoraMoE.from_pretrained(".", base=tiny_base()).expert_names == ["red"]


def test_a_checkpoint_without_a_routed_expert_is_refused(tmp_path):
    mixture = DyLoraMoE.from_base(tiny_base(), config())
    mixture.expert_states.update(dict.fromkeys(mixture.expert_names, NEW))
    mixture.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no expert is 'routed'"):
        DyLoraMoE.from_pretrained(tmp_path / "out", base=tiny_base())


def test_rename_within_use_experts():
    mixture = DyLoraMoE.from_base(tiny_base(), config()).eval()
    ids = torch.arange(1, 6)[None]
    with mixture.use_experts("red"):
        expected = mixture(ids).logits
        mixture.rename_expert("red", "crimson")
        assert torch.equal(mixture(ids).logits, expected)


def test_wrong_arguments_are_named_before_anything_is_built(tmp_path):
    base, adapters = tiny_base(), {"red": str(tmp_path)}
    for run, message in (
        (
            lambda: DyLoraMoE.from_adapters(base, ["a", "b"]),
            r"adapters must map the name of an expert to the folder or",
        ),
        (lambda: DyLoraMoE.from_adapters(base, "owner/name"), r"not be 'owner/name': adapters={\"sql\": …"),
        (lambda: DyLoraMoE.from_adapters(base, adapters, {"top_k": 1}), r"config must be a MoELoraConfig"),
        (lambda: DyLoraMoE.from_base(base, {"r": 4}), r"config must be a MoELoraConfig"),
        (lambda: DyLoraMoE.from_base(base, LoraConfig(r=4)), r"config must be a MoELoraConfig"),
        (lambda: DyLoraMoE.from_base(base, config(), ["red"]), r"expert_configs must map"),
        (
            lambda: DyLoraMoE.from_base(base, config(), {"red": {"r": 4}}),
            r"expert_configs\['red'\] must be a LoraConfig",
        ),
        (lambda: gradient_report(base), "gradient_report needs a DyLoraMoE, not LlamaForCausalLM"),
    ):
        with pytest.raises(TypeError, match=message):
            run()
    mixture = DyLoraMoE.from_base(base, config())  # which is as bare as it was
    with pytest.raises(TypeError, match="weights must map the name of an expert to a number"):
        mixture.export_mixture(["red"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"expert 'red': .* of its tensors are not given"):
        mixture.load_expert("red", {})
    with pytest.raises(TypeError, match=r"results=.*: map columns to rows to values"):
        mixture.save_pretrained(tmp_path / "out", results={"base": 0.5})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="router_type='x': choose one of mlp, linear"):
        Router(4, 2, "x")
