"""What must be refused, or must not leak, when a mixture is built, changed and saved in unusual ways."""

from __future__ import annotations

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig, Router, gradient_report
from dylora_moe.checkpoint.adapters import read_adapter
from dylora_moe.experts.expert_set import NEW
from stock import assert_unchanged, logits, snapshot
from tiny import tiny_base as small_base
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


def test_the_arguments_of_pefts_load_adapter(tmp_path):
    stock = tmp_path / "run" / "law"
    DyLoraMoE.from_base(tiny_base(), config(expert_names=["law"], init_lora_weights=False)).export_expert("law", stock)
    mixture = DyLoraMoE.from_base(tiny_base().bfloat16(), config())
    options = {"torch_device": "cpu", "low_cpu_mem_usage": True, "revision": "main", "is_trainable": True}
    result = mixture.load_adapter(str(tmp_path / "run"), "law", subfolder="law", **options)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    mixture.load_adapter(stock, "narrow", autocast_adapter_dtype=False)
    expected = read_adapter(stock, tiny_base()).tensors
    for name, dtype, trains in (("law", torch.float32, True), ("narrow", torch.bfloat16, False)):
        for part in mixture.expert_tensors(name):
            assert part.tensor.dtype == dtype
            assert part.tensor.requires_grad is trains
            torch.testing.assert_close(part.tensor.data, expected[part.key].to(dtype), rtol=0, atol=0)
    names = mixture.expert_names
    for unfit in ({"ephemeral_gpu_offload": True}, {"key_mapping": {"a": "b"}}):
        with pytest.raises(ValueError, match="takes neither"):
            mixture.load_adapter(str(stock), "other", **unfit)
    with pytest.raises(TypeError, match="unknown arguments offload_dir; a download takes revision, token"):
        mixture.load_adapter(str(stock), "other", offload_dir="x")
    with pytest.raises(RuntimeError, match="device"):
        mixture.load_adapter(str(stock), "other", torch_device="nowhere")
    assert mixture.expert_names == names


def test_loading_into_an_expert_that_is_there(tmp_path):
    other = DyLoraMoE.from_base(tiny_base(), config(init_lora_weights=False))
    other.export_expert("red", tmp_path / "red")
    mixture = DyLoraMoE.from_base(tiny_base(), config())
    kept = {part.key: part.tensor for part in mixture.expert_tensors("red")}
    mixture.load_adapter(str(tmp_path / "red"), "red")
    for part, theirs in zip(mixture.expert_tensors("red"), other.expert_tensors("red"), strict=True):
        assert part.tensor is kept[part.key]  # an optimizer may hold it
        assert torch.equal(part.tensor, theirs.tensor)
        assert part.tensor.requires_grad
    other.add_expert("wide", LoraConfig(r=5, target_modules=["q_proj"]))
    other.export_expert("wide", tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"shape \[5, 32\], expert 'red' of this mixture expects \[2, 32\]"):
        mixture.load_adapter(str(tmp_path / "wide"), "red")


def test_restore_takes_states_and_frozen_ones_over(tmp_path):
    saved = DyLoraMoE.from_base(tiny_base(), config(init_lora_weights=False))
    saved.add_expert("late")
    saved.freeze_expert("red")
    saved.save_pretrained(tmp_path / "checkpoint-1")
    mixture = DyLoraMoE.from_base(tiny_base(), config())
    mixture.add_expert("late")
    mixture.start_routing()
    mixture.freeze_expert("green")
    assert mixture.load_adapter(str(tmp_path / "checkpoint-1"), "default", is_trainable=True)
    assert mixture.expert_states == saved.expert_states == {"red": "routed", "green": "routed", "late": NEW}
    assert mixture.frozen_experts == {"red"}
    ids = tokens() % 60
    assert torch.equal(mixture.eval()(ids).logits, saved.eval()(ids).logits)


def test_pefts_methods_do_the_same_or_refuse():
    mixture = DyLoraMoE.from_base(tiny_base(), config())
    assert mixture.active_adapters == ["default"]
    mixture.set_adapter(mixture.active_adapters[0])
    mixture.set_requires_grad(["red"], False)
    assert mixture.frozen_experts == {"red"}
    mixture.set_requires_grad("default", False)
    assert not any(parameter.requires_grad for parameter in mixture.parameters())
    mixture.set_requires_grad("default")
    assert mixture.frozen_experts == set()
    assert all(parameter.requires_grad for parameter in mixture.router.parameters())
    for call in (mixture.merge_adapter, mixture.merge_and_unload, mixture.add_weighted_adapter):
        with pytest.raises(ValueError, match="export_mixture"):
            call()
    for refused in ({"adapter_name": "red"}, {"adapter_name": "default", "inference_mode": True}):
        with pytest.raises(ValueError, match="keeps all its experts active"):
            mixture.set_adapter(**refused)
    for names in ("red", ["green", "blue"]):
        with pytest.raises(ValueError, match=r"would freeze .*, and choose no expert"):
            mixture.base_model.set_adapter(names)
    assert all(part.tensor.requires_grad for name in mixture.expert_names for part in mixture.expert_tensors(name))
    with pytest.raises(TypeError, match="then base="):
        DyLoraMoE.from_pretrained(tiny_base(), "folder")  # pyright: ignore[reportArgumentType]  # PEFT's order


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


# ------------------------------------------------------------------ PEFT's own methods, each right or refused

REFUSED = {
    "set_adapter": (lambda m: m.set_adapter("red"), "keeps all its experts active"),
    "merge_and_unload": (lambda m: m.merge_and_unload(), "no single merged weight"),
    "add_weighted_adapter": (lambda m: m.add_weighted_adapter(["red"], [1.0], "x"), r"export_mixture.*add_expert"),
    "inject_adapter": (lambda m: m.inject_adapter(m.get_base_model(), "x"), "use add_expert"),
    "get_prompt": (lambda m: m.get_prompt(2), "no virtual prompt"),
    "get_prompt_embedding_to_save": (lambda m: m.get_prompt_embedding_to_save("red"), "no virtual prompt"),
    "merge_adapter": (lambda m: m.merge_adapter(), "no single merged weight"),
    "delete_adapter": (lambda m: m.delete_adapter("x"), "unknown expert 'x'"),
    "set_requires_grad": (lambda m: m.set_requires_grad("x", False), "unknown expert 'x'"),
    "save_embedding_layers": (lambda m: m.save_pretrained("x", save_embedding_layers=True), "leave it out"),
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_pefts_methods_cannot_do_on_a_mixture_is_refused(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixture = tiny_mixture()
    before = snapshot(mixture)
    call, message = REFUSED[method]
    with pytest.raises(ValueError, match=message):
        call(mixture)
    assert_unchanged(mixture, before)
    assert mixture.expert_names == ["red", "green", "blue"]
    assert list(tmp_path.iterdir()) == []


PAST_THE_MIXTURE = {
    "added to the base": lambda m: m.base_model.add_adapter(LoraConfig(r=2, target_modules=["k_proj"]), "late"),
    "summed up": lambda m: m.base_model.add_weighted_adapter(["red", "green"], [1.0, 1.0], "late", "linear"),
    "deleted": lambda m: m.base_model.delete_adapter("green"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", PAST_THE_MIXTURE)
def test_adapters_changed_past_the_mixture_are_not_lost_on_saving(way, tmp_path):
    mixture = tiny_mixture()
    PAST_THE_MIXTURE[way](mixture)
    with pytest.raises(ValueError, match=r"(late|green): added to or removed from PEFT's own layers"):
        mixture.save_pretrained(tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()


def test_set_requires_grad_is_saved(tmp_path):
    mixture = tiny_mixture()
    mixture.set_requires_grad(["red", "blue"], False)
    mixture.set_requires_grad("blue")
    assert mixture.frozen_experts == {"red"}
    mixture.save_pretrained(tmp_path)
    assert DyLoraMoE.from_pretrained(tmp_path, base=small_base()).frozen_experts == {"red"}


def test_disabling_and_enabling_the_layers_brings_back_what_trained():
    mixture = tiny_mixture()
    mixture.freeze_expert("green")
    trainable = {name: p.requires_grad for name, p in mixture.named_parameters()}
    expected, bare = logits(mixture, tokens()), logits(mixture, tokens(), experts="base")
    mixture.disable_adapter_layers()
    assert torch.equal(logits(mixture, tokens()), bare)
    mixture.enable_adapter_layers()
    assert torch.equal(logits(mixture, tokens()), expected)
    assert {name: p.requires_grad for name, p in mixture.named_parameters()} == trainable


def test_the_model_card_is_the_mixtures_own(tmp_path):
    mixture = tiny_mixture()
    (tmp_path / "README.md").write_text("Trainer's")
    mixture.create_or_update_model_card(str(tmp_path))
    mixture.save_pretrained(tmp_path / "mixture")
    assert (tmp_path / "README.md").read_text() == (tmp_path / "mixture" / "README.md").read_text()


def test_preparing_for_checkpointing_leaves_the_embeddings_alone():
    mixture = tiny_mixture()
    base = mixture.get_base_model()
    assert mixture.prepare_model_for_gradient_checkpointing(base) is base
    mixture.enable_input_require_grads()
    assert not base.get_input_embeddings()(tokens()).requires_grad


def test_counts_of_parameters_are_those_of_the_mixture(capsys):
    mixture = tiny_mixture()
    mixture.freeze_expert("green")
    report = mixture.parameter_report()
    trained = report.router + report.experts["red"] + report.experts["blue"]
    assert mixture.get_nb_trainable_parameters() == (
        trained,
        report.base + sum(report.experts.values()) + report.router,
    )
    mixture.print_trainable_parameters()
    assert f"trainable params: {trained:,}" in capsys.readouterr().out
    assert mixture.active_adapters == ["default"]
    assert mixture.get_model_status().available_adapters == sorted(mixture.expert_names)


def test_tying_and_casting(tmp_path):
    tied = tiny_mixture(base=small_base(tie_word_embeddings=True))
    expected = logits(tied, tokens())
    tied.tie_weights()
    assert tied.get_base_model().lm_head.weight is tied.get_base_model().model.embed_tokens.weight
    assert torch.equal(logits(tied, tokens()), expected)
    on_head = tiny_mixture(target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"tie_weights\(\): experts adapt the embeddings or the head"):
        on_head.tie_weights()
    for cast in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64)):
        mixture = cast(tiny_mixture())
        mixture.save_pretrained(tmp_path / "mixture")
        base = cast(small_base())
        loaded = DyLoraMoE.from_pretrained(tmp_path / "mixture", base=base)
        assert {p.dtype for p in loaded.parameters()} == {base.dtype}
        assert torch.equal(logits(loaded, tokens()), logits(mixture, tokens()))


def test_an_expert_added_after_saving_is_saved_next_time(tmp_path):
    mixture = tiny_mixture()
    mixture.save_pretrained(tmp_path)
    mixture.add_adapter("late", LoraConfig(r=2, target_modules=["q_proj"]))
    mixture.delete_adapter("red")
    mixture.save_pretrained(tmp_path)
    assert DyLoraMoE.from_pretrained(tmp_path, base=small_base()).expert_names == ["green", "blue", "late"]
    assert not (tmp_path / "red").exists()
