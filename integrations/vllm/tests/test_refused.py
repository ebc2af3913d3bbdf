"""What cannot be served is one error that names the value, before the engine runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from comparison import HERE, EngineFailed, reference, requests, run


def variant(folder: Path, out: Path, **changes: Any) -> Path:
    """The same export with another section."""
    shutil.copytree(folder, out, copy_function=os.link)
    config = json.loads((folder / "config.json").read_text())
    config["dylora_moe"] |= changes
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(config))
    return out


MODULE = "model.layers.1.self_attn.q_proj"
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"version": 2}, "dylora_moe.version=2: this plugin reads version 1"),
    ({"temperature": float("nan")}, "dylora_moe.temperature=nan"),
    ({"temperature": float("inf")}, "dylora_moe.temperature=inf"),
    ({"modules": {MODULE: [[0, 10**9, 1.0]]}}, "rank=1000000000"),
    ({"modules": {"../../etc/passwd": [[0, 4, 1.0]]}}, "dylora_moe.modules='../../etc/passwd'"),
    ({"selectors": {"../../etc": [1, 0, 0, 0]}}, "dylora_moe.selectors='../../etc'"),
    ({"router_layer": 10**9}, "dylora_moe.router_layer=1000000000"),
    ({"granularity": "sequence"}, "dylora_moe.granularity='sequence'"),
    ({"experts": {"red": 1}}, "dylora_moe.experts=dict"),
    ({"more": 1}, "dylora_moe.'more' is unknown"),
]
ENGINES: list[tuple[str, dict[str, Any], str]] = [
    ("top2", {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
    ("top2", {"enable_lora": True, "lora_target_modules": ["q_proj"]}, "lora_target_modules=['q_proj']"),
    ("prefix", {"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
]


def test_configurations(references: Path, tmp_path: Path) -> None:
    folders = {case: reference(case, references)[0] for case in ("top2", "prefix")}
    jobs: list[Any] = [[str(folders["top2"]), {}]]
    jobs += [[str(variant(folders["top2"], tmp_path / str(i), **c)), {}] for i, (c, _) in enumerate(HOSTILE)]
    jobs += [[str(folders[case]), arguments] for case, arguments, _ in ENGINES]
    expected = [None, *(message for _, message in HOSTILE), *(message for *_, message in ENGINES)]
    file, errors = tmp_path / "jobs.json", tmp_path / "errors.json"
    file.write_text(json.dumps(jobs))
    subprocess.run([sys.executable, HERE / "configurations.py", file, errors], check=True, timeout=600)
    found = json.loads(errors.read_text())
    print("", *found, sep="\n  ")
    for error, message in zip(found, expected, strict=True):
        assert (error is None) if message is None else (error is not None and message in error)


def _without(tensors: dict) -> None:
    del tensors["dylora.router.up"]


def _with(tensors: dict) -> None:
    tensors["dylora.experts.model.layers.0.mlp.up_proj.A"] = tensors["dylora.router.up"].clone()


def _cut(tensors: dict) -> None:
    name = "dylora.experts.model.layers.2.mlp.down_proj.B"
    tensors[name] = tensors[name][:, :-1].contiguous()


BROKEN = {
    "dylora.router.up is missing": _without,
    "dylora.experts.model.layers.0.mlp.up_proj.A is no tensor of this mixture": _with,
    "dylora.experts.model.layers.2.mlp.down_proj.B is torch.float32 [128, 29]: expected floating point [128, 30]": _cut,
}


@pytest.mark.parametrize("message", BROKEN)
def test_tensors(message: str, references: Path, tmp_path: Path) -> None:
    folder, answers = reference("top2", references)
    broken = variant(folder, tmp_path / "broken")
    tensors = load_file(broken / "dylora.safetensors")
    BROKEN[message](tensors)
    (broken / "dylora.safetensors").unlink()
    save_file(tensors, broken / "dylora.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineFailed) as caught:
        run(broken, [{"requests": requests(answers["routed"][:1])}], 1, tmp_path / "scratch")
    assert f"LoadError: {message}" in str(caught.value)


def _of_others(tensors: dict) -> dict:
    return {name.replace("dylora_select", "q_proj"): tensor for name, tensor in tensors.items()}


def _of_fewer_experts(tensors: dict) -> dict:
    return {name: tensor[:, :-1].contiguous() if "lora_A" in name else tensor for name, tensor in tensors.items()}


def _of_nothing(tensors: dict) -> dict:
    return {}


NO_SELECTORS = {
    "expected target modules in {'dylora_select'}": _of_others,
    "SelectorError: an adapter is no selector of {}: it has 3 routing weights": _of_fewer_experts,
    "SelectorError: an adapter is no selector of {}: it has no tensors of the layer dylora_select": _of_nothing,
}


@pytest.mark.parametrize("message", NO_SELECTORS)
def test_another_adapter_is_an_error(message: str, references: Path, tmp_path: Path) -> None:
    """An adapter that is no selector never becomes the base's answer."""
    folder, answers = reference("top2", references)
    other = variant(folder, tmp_path / "other")
    file = other / "selectors" / "red" / "adapter_model.safetensors"
    tensors = NO_SELECTORS[message](load_file(file))
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    rows = answers["red"][:1]
    with pytest.raises(EngineFailed) as caught:
        run(other, [{"requests": requests(rows, "red")}], 1, tmp_path / "scratch", enable_lora=True, max_lora_rank=8)
    assert message.replace("{}", str(other)) in str(caught.value)
