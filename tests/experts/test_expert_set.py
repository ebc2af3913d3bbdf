"""The life of an expert: whatever happens to one, the others stay bit for bit what they were."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dylora_moe import DyLoraMoE, Router
from dylora_moe.experts.expert_set import ExpertSet
from dylora_moe.layers.routed import RoutedLayer
from rounding import EXACT, float64_throughout
from stock import assert_same_tensors, assert_unchanged, logits, save_stock_adapter, snapshot, stir, stock_logits
from tiny import difference, tiny_base, tiny_config, tiny_mixture, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def parts(model: DyLoraMoE, *names: str) -> dict[str, Tensor]:
    """Tensors and forced outputs of some experts."""
    found = {f"{name} {t.name}": t.tensor.detach().clone() for name in names for t in model.expert_tensors(name)}
    return found | {f"{name} forced": logits(model, tokens(), experts=name) for name in names}


@pytest.mark.parametrize("source", ["default", "configuration", "folder"])
@pytest.mark.parametrize("route_to_base", [False, True])
def test_adding_leaves_old_experts_and_router_rows_bit_identical(source, route_to_base, tmp_path):
    config = LoraConfig(r=5, target_modules=["q_proj", "lm_head"], use_dora=True)
    given = {"default": None, "configuration": config, "folder": None}[source]
    if source == "folder":
        given = save_stock_adapter(tmp_path, config)
    model = tiny_mixture(route_to_base=route_to_base)
    old, rows, down = parts(model, "red", "green", "blue"), model.router.up.clone(), model.router.down.clone()
    model.add_expert("late", given)
    assert model.expert_names == ["red", "green", "blue", "late"]
    assert (model.num_experts, model.moe_config.num_experts) == (4, 4)
    assert model.moe_config.expert_names == model.expert_names
    assert model.expert_states["late"] == "new"
    assert model.router.num_outputs == 4 + route_to_base
    assert torch.equal(model.router.up[[0, 1, 2, *([4] if route_to_base else [])]], rows)
    assert torch.equal(model.router.down, down)
    assert_same_tensors(parts(model, "red", "green", "blue"), old)
    assert {tensor.tensor.requires_grad for tensor in model.expert_tensors("late")} == {source != "folder"}
    rank = {"default": 3, "configuration": 5, "folder": 5}[source]
    assert model.peft_config["late"].r == rank
    if source == "folder":
        assert torch.equal(logits(model, tokens(), experts="late"), stock_logits(tmp_path, tiny_base(), tokens()))


def test_trainable_can_be_chosen(tmp_path):
    model = tiny_mixture()
    model.add_expert("kept", trainable=False)
    model.add_expert("tuned", save_stock_adapter(tmp_path, LoraConfig(r=2, target_modules=["q_proj"])), trainable=True)
    assert not any(tensor.tensor.requires_grad for tensor in model.expert_tensors("kept"))
    assert all(tensor.tensor.requires_grad for tensor in model.expert_tensors("tuned"))


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"granularity": "sequence"}, {"route_to_base": True}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@float64_throughout()
def test_new_expert_is_masked_until_routing_starts(settings, training):
    model = tiny_mixture(dtype=torch.float64, **settings).train(training)
    with torch.no_grad():
        before = model(tokens())
        model.add_expert("late", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        masked = model(tokens())
    assert (masked.routing_weights[..., 3] == 0).all()
    assert torch.isneginf(masked.router_logits[..., 3]).all()
    kept = [0, 1, 2, *([4] if "route_to_base" in settings else [])]
    assert difference(masked.router_logits[..., kept], before.router_logits) <= EXACT
    assert difference(masked.routing_weights[..., :3], before.routing_weights) <= EXACT
    assert difference(masked.logits, before.logits) <= EXACT

    model.start_routing()
    assert model.expert_states["late"] == "routed"
    model.router.up.data[3] = 10 * model.router.up.data[:3].abs().max()
    with torch.no_grad():
        routed = model(tokens())
    assert torch.isfinite(routed.router_logits).all()
    assert routed.routing_weights[..., 3].max() > 0


def test_routing_starts_for_the_named_experts_only():
    model = tiny_mixture()
    model.add_expert("late")
    model.add_expert("last")
    model.start_routing("last")
    assert list(model.expert_states.values()) == ["routed", "routed", "routed", "new", "routed"]
    with pytest.raises(ValueError, match="unknown expert 'gray'; the experts are red, green, blue, late, last"):
        model.start_routing("gray")


BAD_SOURCES = {
    "taken": ("red", None, ValueError, "expert 'red' exists already"),
    "taken in other letters": ("Red", None, ValueError, "differs from 'red' in capitals only"),
    "reserved": ("mlp", None, ValueError, "expert name 'mlp' is reserved"),
    "part of an adapted layer": ("lora_dropout", None, ValueError, "is reserved"),
    "no configuration": ("late", 3, TypeError, "LoraConfig or an adapter's folder"),
    "no target": ("late", LoraConfig(target_modules=["c_attn"]), ValueError, "matches no module"),
    "cannot be mixed": ("late", LoraConfig(target_modules=["q_proj"], bias="all"), ValueError, "bias='all'"),
    "fails half way": (
        "late",
        LoraConfig(target_modules=["q_proj", "down_proj", "lm_head"], alpha_pattern={"layers.2.mlp.down_proj": "big"}),
        TypeError,
        "unsupported operand",
    ),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_failed_addition_leaves_the_model_as_it_was(kind):
    name, source, error, message = BAD_SOURCES[kind]
    model = tiny_mixture(target_modules=["q_proj", "v_proj"])
    before, config = snapshot(model), model.moe_config.to_dict()
    output = logits(model, tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            model.add_expert(name, source)
    assert_unchanged(model, before)
    assert (model.expert_names, model.moe_config.to_dict()) == (["red", "green", "blue"], config)
    assert list(model.peft_config) == ["red", "green", "blue"]
    assert torch.equal(logits(model, tokens()), output)
    model.add_expert("late")


@pytest.mark.parametrize("step", ["grow", "match_modes"])
def test_addition_that_breaks_at_any_step_is_undone(step, monkeypatch):
    model = tiny_mixture(target_modules=["q_proj"], router_layer=0)
    before = snapshot(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Router if step == "grow" else ExpertSet, step, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.add_expert("late", LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert_unchanged(model, before)
    assert model.expert_names == ["red", "green", "blue"]


@pytest.mark.parametrize("removed", ["red", "green", "blue"])
@pytest.mark.parametrize("route_to_base", [False, True])
def test_removing_leaves_the_others_bit_identical(removed, route_to_base):
    model = tiny_mixture(route_to_base=route_to_base, top_k=3, train_top_k=3)
    rest = [name for name in model.expert_names if name != removed]
    kept = [i for i, name in enumerate(model.expert_names) if name != removed] + [3] * route_to_base
    before, rows = parts(model, *rest), model.router.up[kept].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.remove_expert(removed)
    assert model.expert_names == rest == list(model.peft_config) == model.moe_config.expert_names
    assert torch.equal(model.router.up, rows)
    assert_same_tensors(parts(model, *rest), before)
    assert not any(f".{removed}." in name for name in model.state_dict())
    assert (model.moe_config.top_k, model.moe_config.train_top_k) == (2 + route_to_base, 2 + route_to_base)
    assert model(tokens()).routing_weights.shape[-1] == 2


def test_adding_and_removing_is_nothing():
    """Layers that only the removed expert adapted are the base's own again."""
    model = tiny_mixture(target_modules=["q_proj"])
    before = snapshot(model)
    model.add_expert("late", LoraConfig(r=2, target_modules=["up_proj", "embed_tokens", "lm_head"]))
    assert model.passes_per_step == 1.25
    model.remove_expert("late")
    assert_unchanged(model, before)
    assert model.passes_per_step == 1.0


def test_what_cannot_be_removed():
    model = tiny_mixture(expert_names=["red", "green"])
    model.add_expert("late")
    model.remove_expert("red")
    before = snapshot(model)
    with pytest.raises(ValueError, match="without 'green' only experts that are not routed yet are left"):
        model.remove_expert("green")
    with pytest.raises(ValueError, match="unknown expert 'red'; the experts are green, late"):
        model.remove_expert("red")
    assert_unchanged(model, before)
    model.remove_expert("late")
    with pytest.raises(ValueError, match="'green' is the only expert"):
        model.remove_expert("green")


def test_merged_expert_is_not_removed_half():
    model = tiny_mixture()
    model.base_model.merge_adapter(["red"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'red' is merged into the base's weights; call unmerge_adapter\(\)"):
        model.remove_expert("red")
    assert_unchanged(model, before)
    assert model.router.num_outputs == 3


def kinds(base: nn.Module) -> DyLoraMoE:
    experts = {
        "zebra": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        "ids": LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"]),
        "apple": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], lora_dropout=0.2, use_rslora=True),
    }
    model = tiny_mixture(base=base, experts=experts)
    stir(model)
    return model


@pytest.mark.parametrize("old", ["zebra", "ids", "apple"])
def test_renaming_changes_a_name_and_nothing_else(old, tmp_path):
    model = kinds(tiny_base())
    parameters, before = list(model.parameters()), [logits(model, tokens())]
    before += [logits(model, tokens(), experts=name) for name in model.expert_names]
    names = ["middle" if name == old else name for name in model.expert_names]
    model.freeze_expert(old)
    model.rename_expert(old, "middle")
    assert model.expert_names == names == list(model.peft_config) == model.moe_config.expert_names
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert not any(old in name.split(".") for name in model.state_dict())
    found = [logits(model, tokens()), *(logits(model, tokens(), experts=name) for name in names)]
    assert all(map(torch.equal, found, before))
    assert not any(tensor.tensor.requires_grad for tensor in model.expert_tensors("middle"))
    model.save_pretrained(tmp_path)
    loaded = DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base())
    assert torch.equal(logits(loaded, tokens()), before[0])


@pytest.mark.parametrize(
    ("old", "new"), [("red", "green"), ("red", "Green"), ("red", "mlp"), ("red", "base"), ("gray", "x")]
)
def test_refused_renaming(old, new):
    model = tiny_mixture()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"exists already|capitals only|is reserved|unknown expert 'gray'"):
        model.rename_expert(old, new)
    assert_unchanged(model, before)


def test_an_expert_may_be_renamed_to_its_own_name_in_capitals(tmp_path):
    model = tiny_mixture()
    model.rename_expert("red", "RED")
    model.save_pretrained(tmp_path)
    assert DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base()).expert_names == ["RED", "green", "blue"]


def test_an_optimizer_goes_on_with_a_renamed_expert():
    models = [tiny_mixture().train() for _ in range(2)]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(tokens(), labels=tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            models[1].rename_expert("red", "crimson")
    states = [list(model.state_dict().values()) for model in models]
    assert all(map(torch.equal, *states))
    assert not torch.equal(models[0].expert_tensors("red")[0].tensor, tiny_mixture().expert_tensors("red")[0].tensor)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
@float64_throughout()
def test_renaming_a_merged_expert_leaves_nothing_of_it_in_the_base():
    """PEFT takes it out of the base's weights by its name."""
    model = tiny_mixture(dtype=torch.float64)
    before, base = logits(model, tokens()), logits(model, tokens(), experts="base")
    model.base_model.merge_adapter(["red"])
    model.rename_expert("red", "crimson")
    assert difference(logits(model, tokens()), before) <= EXACT
    assert difference(logits(model, tokens(), experts="base"), base) <= EXACT


@float64_throughout()
def test_frozen_expert_is_used_but_gets_no_gradient():
    model = tiny_mixture(dtype=torch.float64).train()
    expected = logits(model, tokens())
    model.freeze_expert("green")
    model.add_expert("late")  # refreshes what is trainable
    output = model(tokens(), labels=tokens())
    assert difference(output.logits, expected) <= EXACT
    output.loss.backward()
    assert all(tensor.tensor.grad is None for tensor in model.expert_tensors("green"))
    assert all(tensor.tensor.grad is not None for tensor in model.expert_tensors("red"))
    model.unfreeze_expert("green")
    model(tokens(), labels=tokens()).loss.backward()
    assert all(tensor.tensor.grad is not None for tensor in model.expert_tensors("green"))
    for call in (model.freeze_expert, model.unfreeze_expert):
        with pytest.raises(ValueError, match="unknown expert 'gray'"):
            call("gray")


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_a_new_expert_follows_the_mode(training):
    model = tiny_mixture(lora_dropout=0.5).train(training)
    model.add_expert("late")
    stir(model)
    assert {module.training for module in model.modules()} == {training}
    first, second = (logits(model, tokens(), experts="late") for _ in range(2))
    assert torch.equal(first, second) is not training


def test_pefts_names_for_the_same(tmp_path):
    folder = save_stock_adapter(tmp_path, LoraConfig(r=2, target_modules=["q_proj"]))
    model = tiny_mixture()
    model.add_adapter("made", LoraConfig(r=4, target_modules=["v_proj"]))
    model.load_adapter(str(folder), "loaded")
    model.load_adapter(str(folder), "tuned", is_trainable=True)
    assert model.expert_names == ["red", "green", "blue", "made", "loaded", "tuned"]
    assert torch.equal(logits(model, tokens(), experts="loaded"), stock_logits(folder, tiny_base(), tokens()))
    assert [model.expert_tensors(name)[0].tensor.requires_grad for name in ("loaded", "tuned")] == [False, True]
    model.delete_adapter("red")
    assert model.expert_names[0] == "green"
    with pytest.raises(ValueError, match=r"pass experts=\.\.\. to forward or generate"):
        model.set_adapter("green")
    with pytest.raises(ValueError, match="export_mixture"):
        model.merge_and_unload()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_unload_gives_the_bare_base_back(architecture):
    fresh = tiny_base(architecture)
    model = tiny_mixture(architecture, router_layer=2, layers_to_transform=[0, 1, 2, 3]).train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model(tokens(), labels=tokens()).loss.backward()
    base = model.unload().eval()
    assert [(name, type(m)) for name, m in base.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    assert_same_tensors(dict(base.state_dict()), dict(fresh.state_dict()))
    for module in base.modules():
        assert not isinstance(module, RoutedLayer)
        assert not {**module._forward_hooks, **module._forward_pre_hooks, **module._backward_hooks}
        assert "KeepRouting" not in repr(module.__dict__.get("_gradient_checkpointing_func"))
    base.activation_checkpointing_disable()
    assert torch.equal(logits(base, tokens()), logits(fresh, tokens()))
    outputs = []
    for model in (base, fresh):
        torch.manual_seed(0)
        outputs.append(logits(tiny_mixture(architecture, base=model), tokens()))
    assert torch.equal(*outputs)


def test_every_tensor_of_an_expert_is_found_once():
    model = kinds(tiny_base())
    found = [tensor for name in model.expert_names for tensor in model.expert_tensors(name)]
    named = dict(model.named_parameters())
    assert {tensor.name for tensor in found} == {name for name in named if "lora_" in name}
    assert len(found) == len({tensor.name for tensor in found})
    assert all(named[tensor.name] is tensor.tensor for tensor in found)
    with pytest.raises(ValueError, match="unknown expert 'gray'"):
        model.expert_tensors("gray")


def test_base_is_left_to_its_owner_when_the_configuration_is_wrong():
    base = tiny_base()
    before = snapshot(base)
    with pytest.raises(ValueError, match="bias='all'"):
        DyLoraMoE(base, tiny_config(expert_names=["a"]), {"a": LoraConfig(target_modules=["q_proj"], bias="all")})
    assert_unchanged(base, before)
    assert not Path("adapter_config.json").exists()
