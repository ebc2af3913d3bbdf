"""Bad checkpoints and adapters: the file and what was expected are named, and everything stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dylora_moe import CheckpointError, DyLoraMoE
from stock import assert_unchanged, logits, save_stock_adapter, snapshot
from tiny import tiny_base, tiny_mixture, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
Damage = Callable[[Path], None]


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def change_json(**fields: object) -> Damage:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def drop_json(field: str) -> Damage:
    def damage(file: Path) -> None:
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != field}))

    return damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def replace_by_pickle(name: str) -> Damage:
    def damage(file: Path) -> None:
        torch.save(load_file(file), file.with_name(name))
        file.unlink()

    return damage


def with_value(key: str, value: float) -> Damage:
    return change_tensors(lambda tensors: tensors[key].view(-1)[3:4].fill_(value))


ADAPTER_DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "missing tensors file": ("adapter_model.safetensors", Path.unlink, "is missing"),
    "missing configuration": ("adapter_config.json", Path.unlink, "is missing"),
    "truncated": ("adapter_model.safetensors", truncate, "is truncated or damaged"),
    "empty": ("adapter_model.safetensors", lambda file: file.write_bytes(b""), "is truncated or damaged"),
    "pickle only": (
        "adapter_model.safetensors",
        replace_by_pickle("adapter_model.bin"),
        "adapter_model.bin is a pickle",
    ),
    "missing tensor": (
        "adapter_model.safetensors",
        change_tensors(lambda tensors: tensors.pop(KEY)),
        f"1 of 18 tensors missing, first {KEY}",
    ),
    "unknown tensor": (
        "adapter_model.safetensors",
        change_tensors(lambda tensors: tensors.update({"base_model.model.extra": torch.ones(2)})),
        "1 tensors that this LlamaForCausalLM does not have, first base_model.model.extra",
    ),
    "wrong shape": (
        "adapter_model.safetensors",
        change_tensors(lambda tensors: tensors.update({KEY: torch.ones(3, 15)})),
        f"{KEY} has shape [3, 15], this LlamaForCausalLM expects [3, 16]",
    ),
    "nan": ("adapter_model.safetensors", with_value(KEY, float("nan")), f"{KEY} holds values that are not finite"),
    "infinity": ("adapter_model.safetensors", with_value(KEY, float("inf")), f"{KEY} holds values that are not finite"),
    "broken json": ("adapter_config.json", lambda file: file.write_text('{"r": 3,'), "cannot be read as JSON"),
    "json list": ("adapter_config.json", lambda file: file.write_text("[]"), "holds list; expected a JSON object"),
    "not text": ("adapter_config.json", lambda file: file.write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "not lora": ("adapter_config.json", change_json(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
    "no type": ("adapter_config.json", drop_json("peft_type"), "peft_type is None; only LORA"),
    "modules_to_save": ("adapter_config.json", change_json(modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "bias": ("adapter_config.json", change_json(bias="all"), "bias='all'"),
    "rank zero": ("adapter_config.json", change_json(r=0), ": r=0: a positive integer"),
    "rank as text": ("adapter_config.json", change_json(r="three"), "r is 'three'; expected a number"),
    "alpha as text": ("adapter_config.json", change_json(lora_alpha="x"), "lora_alpha is 'x'; expected a number"),
    "other rank": ("adapter_config.json", change_json(r=2), "expects [2, 16]"),
}
MIXTURE_DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "missing configuration": ("moe_config.json", Path.unlink, "is missing"),
    "broken configuration": ("moe_config.json", lambda file: file.write_text("{"), "cannot be read as JSON"),
    "newer format": ("moe_config.json", change_json(format_version=3), "format_version 3 is newer than 2"),
    "no format": ("moe_config.json", drop_json("format_version"), "format_version is None"),
    "no experts": ("moe_config.json", drop_json("experts"), "experts"),
    "no settings": ("moe_config.json", drop_json("config"), "config"),
    "unknown setting": ("moe_config.json", change_json(config={"num_expert": 3}), "num_expert"),
    "wrong setting": (
        "moe_config.json",
        change_json(config={"expert_names": ["red", "green", "blue"], "top_k": 9}),
        "top_k=9",
    ),
    "other names": ("moe_config.json", change_json(config={"num_experts": 3}), "do not agree with expert_names"),
    "unknown state": (
        "moe_config.json",
        change_json(experts=[{"name": name, "state": "old"} for name in ("red", "green", "blue")]),
        "'red': 'old'",
    ),
    "missing router": ("router.safetensors", Path.unlink, "is missing"),
    "truncated router": ("router.safetensors", truncate, "is truncated or damaged"),
    "pickled router": ("router.safetensors", replace_by_pickle("router.pt"), "router.pt is a pickle"),
    "small router": (
        "router.safetensors",
        change_tensors(lambda tensors: tensors.update(up=torch.ones(2, 64))),
        "up has shape [2, 64], the router of the mixture expects [3, 64]",
    ),
    "half a router": ("router.safetensors", change_tensors(lambda tensors: tensors.pop("down")), "first down"),
    "other router": (
        "router.safetensors",
        change_tensors(lambda tensors: tensors.update(gate=torch.ones(1))),
        "first gate",
    ),
    "nan in the router": ("router.safetensors", with_value("up", float("nan")), "up holds values that are not finite"),
    "missing expert": ("green", shutil.rmtree, "no such folder; expected one with adapter_config.json"),
}


def assert_refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "mixture"
    tiny_mixture().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(checkpoint_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint_folder, tmp_path / "mixture")


@pytest.mark.parametrize("damage", ADAPTER_DAMAGES)
def test_damaged_expert(damage, copied):
    """Refused by all three ways to read it; the base and an existing mixture stay as they were, bit for bit."""
    file, apply, message = ADAPTER_DAMAGES[damage]
    apply(copied / "green" / file)
    expected_file = str(copied / "green" / ("adapter_model.bin" if "pickle" in damage else file))
    if damage == "other rank":  # shows in the tensors
        expected_file = str(copied / "green" / "adapter_model.safetensors")
    base = tiny_base()
    before, output = snapshot(base), logits(base, tokens())
    assert_refused(lambda: DyLoraMoE.from_pretrained(str(copied), base=base), message, expected_file)
    adapters = {"red": str(copied / "red"), "green": str(copied / "green")}
    assert_refused(lambda: DyLoraMoE.from_adapters(base, adapters), message, expected_file)
    assert_unchanged(base, before)
    assert torch.equal(logits(base, tokens()), output)

    model = DyLoraMoE.from_base(base)
    before, output = snapshot(model), logits(model, tokens())
    assert_refused(lambda: model.add_expert("late", copied / "green"), message, expected_file)
    assert_unchanged(model, before)
    assert (model.num_experts, model.moe_config.num_experts, model.router.num_outputs) == (4, 4, 4)
    assert torch.equal(logits(model, tokens()), output)


@pytest.mark.parametrize("damage", MIXTURE_DAMAGES)
def test_damaged_mixture(damage, copied):
    file, apply, message = MIXTURE_DAMAGES[damage]
    apply(copied / file)
    base = tiny_base()
    before = snapshot(base)
    expected_file = str(copied / ("router.pt" if "pickle" in damage else file))
    assert_refused(lambda: DyLoraMoE.from_pretrained(str(copied), base=base), message, expected_file)
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_folder", "no such folder; expected one with adapter_config.json, adapter_model.safetensors, or"),
        ("./no/such", "no such folder; expected one with adapter_config.json"),
        ("/no/such", "no such folder; expected one with adapter_config.json"),
        ("owner/adapter-on-the-hub", "no such folder, and the hub did not deliver it"),
    ],
)
def test_folder_that_does_not_exist_offline(source, message):
    model = tiny_mixture()
    before = snapshot(model)
    assert_refused(lambda: model.add_expert("late", source), source, message)
    assert_unchanged(model, before)
    assert_refused(lambda: DyLoraMoE.from_pretrained(source, base=tiny_base()), source, message.split(";")[0])


def test_file_instead_of_a_folder(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    file.touch()
    assert_refused(lambda: tiny_mixture().add_expert("late", file), str(file), "is a file; expected a folder with")


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("gpt2", {"target_modules": ["c_attn"]}, "does not fit LlamaForCausalLM"),
        ("llama", {"target_modules": ["q_proj"]}, "has shape [2, 32], this LlamaForCausalLM expects [2, 16]"),
        ("opt", {"target_modules": ["q_proj", "v_proj"]}, "tensors missing"),
    ],
)
def test_adapter_for_another_architecture(architecture, config, message, tmp_path):
    wider = {"hidden_size": 32} if architecture == "llama" else {}
    config = LoraConfig(r=2, base_model_name_or_path="somebody/else", **config)
    folder = save_stock_adapter(tmp_path / "adapter", config, architecture, **wider)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": "somebody/else"}))
    base = tiny_base()
    before = snapshot(base)
    assert_refused(
        lambda: DyLoraMoE.from_adapters(base, {"odd": str(folder)}), str(folder), message, "made for somebody/else"
    )
    assert_unchanged(base, before)


def test_adapter_that_is_not_lora(tmp_path):
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(tiny_base(), config).save_pretrained(tmp_path)
    assert_refused(lambda: tiny_mixture().add_expert("late", tmp_path), "adapter_config.json: peft_type is 'IA3'")


def test_embeddings_saved_beside_an_adapter_must_be_the_bases_own(tmp_path):
    """Stock PEFT writes them along; another base's would be dropped without a word."""
    folder = save_stock_adapter(tmp_path, LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(folder / "adapter_model.safetensors")
    tiny_mixture().add_expert("late", folder)
    other = tiny_mixture(base=tiny_base(seed=1))
    before = snapshot(other)
    assert_refused(lambda: other.add_expert("late", folder), "embed_tokens.base_layer.weight differs from the base's")
    assert_unchanged(other, before)


def test_from_adapters_needs_an_adapter():
    with pytest.raises(ValueError, match="at least one expert"):
        DyLoraMoE.from_adapters(tiny_base(), {})
