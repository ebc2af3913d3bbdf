"""Where a base's files are found, the hub's cache included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dylora_moe.exporting.base_files import check_held, put_weights, read_base
from tiny import tiny_base, tiny_mixture

REVISIONS = ("a" * 40, "b" * 40)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache as the hub's client leaves it: two revisions, whose files are links to what they hold."""
    repository = tmp_path / "hub" / "models--me--tiny"
    for seed, revision in enumerate(REVISIONS):
        tiny_base(seed=seed).save_pretrained(tmp_path / revision)
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for file in (tmp_path / revision).iterdir():
            blob = repository / "blobs" / f"{seed}{file.name}"
            blob.parent.mkdir(exist_ok=True)
            file.rename(blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISIONS[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def loaded(revision: str) -> Any:
    return AutoModelForCausalLM.from_pretrained("me/tiny", revision=revision, cache_dir=constants.HF_HUB_CACHE)


def test_a_base_of_the_hub_is_linked_from_its_cache(cache, tmp_path):
    base = loaded(REVISIONS[0])
    files = read_base(base, "me/tiny")
    assert files.folder == cache / "snapshots" / REVISIONS[0]
    check_held(files, base)
    put_weights(files, tmp_path, copy=False)
    placed = tmp_path / "model.safetensors"
    assert not placed.is_symlink()
    assert placed.samefile(cache / "blobs" / "0model.safetensors")


def test_files_of_another_revision_are_not_the_bases(cache):
    base = loaded(REVISIONS[1])
    with pytest.raises(
        ValueError, match=r"model.safetensors holds other values of .* another revision, or was changed"
    ):
        check_held(read_base(base, "me/tiny"), base)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_that_was_changed_is_not_what_its_files_hold(tmp_path, architecture, dtype):
    tiny_base(architecture).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")  # GPT-2 lies on the hub without the name of its decoder
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    mixture = tiny_mixture(architecture, base=base)
    check_held(read_base(base, None), base)
    layer = mixture.routed_layers[-1]
    layer.base_layer.weight.data[0, 0] += 1
    name = layer.routing_name.removeprefix("transformer.")
    with pytest.raises(ValueError, match=f"holds other values of {name}.weight"):
        mixture.export_vllm(tmp_path / "out")
