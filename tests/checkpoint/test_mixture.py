"""Save and load: everything comes back bit for bit, and every expert's folder is a stock PEFT adapter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from peft import EvaConfig, LoraConfig
from safetensors.torch import load_file

from dylora_moe import CheckpointError, DyLoraMoE
from stock import assert_same_tensors, logits, stir, stock_logits
from tiny import ARCHITECTURES, tiny_base, tiny_config, tiny_mixture, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
]
MODULES = {"gpt2": ("c_attn", "c_fc", "wte"), "opt": ("q_proj", "fc2", "embed_tokens")}
EXPERTS = ("plain", "magnitude", "ids", "scaled")


def every_kind_of_expert(architecture: str) -> dict[str, LoraConfig]:
    attention, feed_forward, embedding = MODULES.get(architecture, ("q_proj", "down_proj", "embed_tokens"))
    flags = {"task_type": "CAUSAL_LM", "fan_in_fan_out": architecture == "gpt2"}
    patterns = {"rank_pattern": {feed_forward: 1}, "alpha_pattern": {attention: 7}}
    linear, both = [attention, feed_forward], {"use_rslora": True, "lora_bias": True}
    return {
        "plain": LoraConfig(r=2, lora_alpha=3, target_modules=linear, lora_dropout=0.1, **flags),
        "magnitude": LoraConfig(r=3, target_modules=[attention], use_dora=True, **flags),
        "ids": LoraConfig(r=2, target_modules=[embedding, feed_forward], **flags),
        "scaled": LoraConfig(r=5, lora_alpha=4, target_modules=linear, **both, **patterns, **flags),
    }


def rich_mixture(architecture: str, folder: Path | None = None, **settings: object) -> DyLoraMoE:
    """Every kind of expert, one of them frozen and one new; the base lies in `folder`."""
    base = tiny_base(architecture)
    if folder is not None:
        base.save_pretrained(folder)
    experts = every_kind_of_expert(architecture)
    config = tiny_config(expert_names=list(experts), **settings)
    model = DyLoraMoE(base, config, experts=experts, base_name=None if folder is None else str(folder))
    model.add_expert("late")
    model.freeze_expert("magnitude")
    stir(model)
    model.router.up.data.mul_(10)
    return model.eval()


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def assert_same_mixture(found: DyLoraMoE, expected: DyLoraMoE) -> None:
    assert_same_tensors(found.state_dict(), expected.state_dict())
    assert found.moe_config.to_dict() == expected.moe_config.to_dict()
    assert found.expert_states == expected.expert_states
    assert found.base_name == expected.base_name
    trainable = {name: p.requires_grad for name, p in expected.named_parameters()}
    assert {name: p.requires_grad for name, p in found.named_parameters()} == trainable
    with torch.no_grad():
        outputs = found(**padded()), expected(**padded())
    for field in ("logits", "router_logits", "routing_weights"):
        assert torch.equal(outputs[0][field], outputs[1][field]), field
    generated = [m.generate(**padded(), max_new_tokens=5, do_sample=False) for m in (found, expected)]
    assert torch.equal(*generated)


SETTINGS = {
    "token": {"router_layer": 2, "top_k": 2, "temperature": 0.7, "router_hidden_size": 8},
    "sequence": {"granularity": "sequence", "route_to_base": True, "router_type": "linear", "balance_loss": "switch"},
}


@pytest.mark.parametrize("granularity", SETTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_then_load_is_bitwise_the_same(architecture, granularity, tmp_path):
    model = rich_mixture(architecture, tmp_path / "base", **SETTINGS[granularity])
    model.save_pretrained(tmp_path / "mixture")
    loaded = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"))
    assert not loaded.training
    assert_same_mixture(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    files = sorted(path.relative_to(tmp_path / "mixture") for path in (tmp_path / "mixture").rglob("*.*"))
    assert len(files) == 3 + 2 * 5
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "mixture" / file).read_bytes(), file


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_expert_folder_is_a_stock_adapter_with_the_forced_output(architecture, tmp_path):
    model = rich_mixture(architecture)
    model.save_pretrained(tmp_path)
    outputs = []
    for name in model.expert_names:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(fan_in_fan_out|missing|unexpected).*")
            stock = stock_logits(tmp_path / name, tiny_base(architecture), tokens())
        assert torch.equal(stock, logits(model, tokens(), experts=name)), name
        outputs.append(stock)
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_training_goes_on_where_it_was_saved(tmp_path):
    """A loaded expert trains exactly like the one that was saved: nothing but tensors decides."""
    models = [tiny_mixture()]
    models[0].save_pretrained(tmp_path)
    models.append(DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base()))
    for model in models:
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]
    assert len(gradients[0]) == 3 * 2 * 9 + 2
    assert_same_tensors(gradients[1], gradients[0])


def test_a_given_base_overrides_the_named_one(tmp_path):
    model = rich_mixture("llama", tmp_path / "base")
    model.save_pretrained(tmp_path / "mixture")
    other = tiny_base(seed=5)
    loaded = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=other)
    assert loaded.get_base_model() is other
    tiny_base(seed=5).save_pretrained(tmp_path / "other")
    by_path = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=str(tmp_path / "other"))
    assert torch.equal(logits(by_path, tokens()), logits(loaded, tokens()))
    assert not torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert by_path.base_name == str(tmp_path / "other")


def test_loading_options_reach_the_base(tmp_path):
    model = rich_mixture("llama", tmp_path / "base")
    model.save_pretrained(tmp_path / "mixture")
    loaded = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), dtype=torch.bfloat16)
    assert loaded.get_base_model().dtype == torch.bfloat16
    assert loaded.expert_tensors("plain")[0].tensor.dtype == torch.float32


def test_the_revision_of_the_base_is_loaded_again(tmp_path, monkeypatch):
    base, asked = tiny_base(), []
    base.config._commit_hash = "0123abc"
    DyLoraMoE(base, tiny_config(), base_name="owner/name").save_pretrained(tmp_path)

    def load_base(name, options):
        asked.append((name, options))
        return tiny_base(), name

    monkeypatch.setattr("dylora_moe.checkpoint.mixture.load_base", load_base)
    assert DyLoraMoE.from_pretrained(str(tmp_path)).base_name == "owner/name"
    DyLoraMoE.from_pretrained(str(tmp_path), revision="main")
    assert asked == [("owner/name", {"revision": "0123abc"}), ("owner/name", {"revision": "main"})]


def test_the_commit_of_a_base_on_the_hub_is_written(tmp_path):
    cache, commits = tmp_path / "cache", {"main": "1" * 40, "v1": "2" * 40}
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in commits.items():
        (repository / "refs" / revision).write_text(commit)
        tiny_base().save_pretrained(repository / "snapshots" / commit)
    for revision, commit in {**commits, "2" * 40: "2" * 40, None: "1" * 40}.items():
        options = {"cache_dir": str(cache), "local_files_only": True, **({"revision": revision} if revision else {})}
        DyLoraMoE.from_base("owner/name", tiny_config(), **options).save_pretrained(tmp_path / "mixture")
        known = json.loads((tmp_path / "mixture" / "moe_config.json").read_text())
        assert (known["base_model_name_or_path"], known["base_revision"]) == ("owner/name", commit)


def test_not_trainable_freezes_router_and_experts(tmp_path):
    tiny_mixture().save_pretrained(tmp_path)
    loaded = DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base(), trainable=False)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == []


def test_unnamed_base_must_be_given(tmp_path):
    tiny_mixture().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"moe_config.json names no base; pass base="):
        DyLoraMoE.from_pretrained(str(tmp_path))


def test_a_base_that_has_moved_is_named_with_the_remedy(tmp_path):
    model = rich_mixture("llama", tmp_path / "base")
    model.save_pretrained(tmp_path / "mixture")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"moe_config.json names the base .*base, which cannot be.*base="
    ) as caught:
        DyLoraMoE.from_pretrained(str(tmp_path / "mixture"))
    assert str(tmp_path / "base") in str(caught.value)
    assert "--base" in str(caught.value)
    loaded = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=str(tmp_path / "elsewhere"))
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_experts_in_lower_precision_stay_so(tmp_path):
    model = tiny_mixture()
    for tensor in model.expert_tensors("green"):
        tensor.tensor.data = tensor.tensor.data.bfloat16()
    model.save_pretrained(tmp_path)
    loaded = DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base())
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert {t.tensor.dtype for t in loaded.expert_tensors("green")} == {torch.bfloat16}
    assert {t.tensor.dtype for t in loaded.expert_tensors("red")} == {torch.float32}


def test_state_dict_is_written_in_place_of_the_models_own_tensors(tmp_path):
    """A trainer gathers sharded tensors and hands them in."""
    model = rich_mixture("llama")
    gathered = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    loaded = DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base())
    own = {name: tensor for name, tensor in loaded.state_dict().items() if "lora_" in name or "router" in name}
    assert len(own) > 50
    assert_same_tensors(own, {name: gathered[name] for name in own})


def test_own_state_dict_writes_the_same_files(tmp_path):
    model = rich_mixture("gpt2")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", state_dict=model.state_dict(), safe_serialization=True)
    for file in (path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors")):
        assert_same_tensors(load_file(tmp_path / "b" / file), load_file(tmp_path / "a" / file))


def test_only_the_main_process_writes(tmp_path):
    tiny_mixture().save_pretrained(tmp_path / "mixture", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_unknown_option_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="selected_adapters"):
        tiny_mixture().save_pretrained(tmp_path / "mixture", selected_adapters=["red"])
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="safe_serialization=False asks for pickles"):
        tiny_mixture().save_pretrained(tmp_path / "mixture", safe_serialization=False)
    assert list(tmp_path.iterdir()) == []


def test_an_older_version_knows_no_prefix_granularity(tmp_path):
    model = tiny_mixture(granularity="prefix")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "moe_config.json").read_text())["format_version"] == 2
    loaded = DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base())
    assert torch.equal(loaded(tokens()).routing_weights, model(tokens()).routing_weights)


def test_configuration_file_says_what_the_mixture_is(tmp_path):
    model = rich_mixture("llama", tmp_path / "base", router_layer="last", top_k=3)
    model.save_pretrained(tmp_path / "mixture")
    fields = json.loads((tmp_path / "mixture" / "moe_config.json").read_text())
    assert fields["format_version"] == 1
    assert fields["base_model_name_or_path"] == str(tmp_path / "base")
    assert [entry["name"] for entry in fields["experts"]] == [*EXPERTS, "late"]
    assert [entry["state"] for entry in fields["experts"]] == ["routed"] * 4 + ["new"]
    assert [entry["name"] for entry in fields["experts"] if entry["frozen"]] == ["magnitude"]
    assert (fields["config"]["router_layer"], fields["config"]["top_k"]) == ("last", 3)


def test_every_lora_field_of_the_mixture_comes_back(tmp_path):
    """They are the defaults of experts that are added later."""
    settings = {"lora_dropout": 0.2, "use_rslora": True, "layers_to_transform": [2], "target_modules": ["q_proj"]}
    model = tiny_mixture(**settings, init_lora_weights="eva", eva_config=EvaConfig(rho=1.5), rank_pattern={"q_proj": 2})
    model.save_pretrained(tmp_path)
    loaded = DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base())
    assert loaded.moe_config.to_dict() == model.moe_config.to_dict()
    loaded.add_expert("late")
    config = loaded.peft_config["late"]
    assert (config.r, config.lora_dropout, config.use_rslora) == (3, 0.2, True)
    assert config.target_modules == {"model.layers.2.self_attn.q_proj"}


def test_card_holds_the_models_own_numbers(tmp_path):
    model = rich_mixture("llama", router_layer=2, route_to_base=True)
    results = {"base": {"sql": 0.125}, "mixture": {"sql": 0.96875, "json": 1.0}}
    model.save_pretrained(tmp_path, results=results, metric="Share of right answers; higher is better.")
    card = (tmp_path / "README.md").read_text()
    report = model.parameter_report()
    for name, count in report.experts.items():
        assert f"| {name} | {count:,} | {100 * count / report.base:.2f} |" in card
    assert f"| router | {report.router:,} |" in card
    assert f"| base (frozen) | {report.base:,} | 100.00 |" in card
    assert "mixture of 5 LoRA experts" in card
    assert "costs 1.50 passes" in card
    assert "| magnitude | 3 | 8 | routed, frozen |" in card
    assert "| late | 3 | 6 | new |" in card
    assert "top-2 in evaluation" in card
    assert "Share of right answers; higher is better.\n\n| held out | base | mixture |" in card
    assert "| sql | 0.125 | 0.969 |" in card
    assert "| json |  | 1.000 |" in card
    assert "folder/plain" in card
    assert "library_name: dylora-moe\n" in card
    assert "pipeline_tag: text-generation\n" in card


def test_card_counts_the_base_route_among_what_top_k_keeps(tmp_path):
    tiny_mixture(expert_names=["red"], route_to_base=True).save_pretrained(tmp_path)
    assert "top-2 in evaluation" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/me/models/my-base", "my-base"),
        ("C:\\Users\\me\\my-base", "my-base"),
        ("/home/me/.cache/huggingface/hub/models--owner--name/snapshots/0123abcd", "owner/name"),
        ("/home/me/a: b", "a: b"),
    ],
)
def test_card_names_the_base_and_no_path_of_the_machine(tmp_path, name, shown):
    DyLoraMoE(tiny_base(), tiny_config(), base_name=name).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == shown
    assert f"with DyLoRA-MoE on `{shown}`" in card
    assert "/home" not in card
    assert "Users" not in card


def test_card_of_a_base_without_a_name(tmp_path):
    model = DyLoraMoE(tiny_base(), tiny_config())
    model.base_name = None
    model.save_pretrained(tmp_path)
    assert "base_model" not in (tmp_path / "README.md").read_text()


def test_experts_of_an_older_version_may_differ_in_case_only(tmp_path):
    tiny_mixture().save_pretrained(tmp_path)
    (tmp_path / "green").rename(tmp_path / "RED")
    file = tmp_path / "moe_config.json"
    file.write_text(file.read_text().replace('"green"', '"RED"'))
    model = DyLoraMoE.from_pretrained(str(tmp_path), base=tiny_base())
    assert model.expert_names == ["red", "RED", "blue"]
    model.rename_expert("RED", "green")
