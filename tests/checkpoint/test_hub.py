"""Mixtures and adapters on the hub, with huggingface_hub played by a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tinybase
from dylora_moe import CheckpointError, DyLoraMoE
from dylora_moe.checkpoint import files
from stock import assert_same_tensors, logits
from tiny import tiny_base, tiny_mixture, tokens
from topics import mixture, teach

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Hub:
    """What huggingface_hub would have done: every call, and a folder per repository."""

    def __init__(self, root: Path):
        self.root, self.calls = root, []

    def api(self, token: str | None = None) -> Hub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        self.calls.append(("create", repo_id, private))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message, revision) -> str:
        self.calls.append(("upload", repo_id, commit_message, revision))
        for file in (path for path in Path(folder_path).rglob("*") if path.is_file()):
            name = file.relative_to(folder_path)
            if any(name.match(pattern) for pattern in allow_patterns):
                (self.root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.root / repo_id / name)
        return "https://hub/commit"

    def download(self, repo_id: str, allow_patterns: list[str]) -> str:
        assert {"*.json", "*.safetensors"} <= set(allow_patterns)
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("dylora_moe.checkpoint.hub.HfApi", hub.api)
    monkeypatch.setattr(files, "snapshot_download", hub.download)
    return hub


def uploaded(hub: Hub, repo_id: str) -> list[str]:
    return sorted(str(path.relative_to(hub.root / repo_id)) for path in (hub.root / repo_id).rglob("*.*"))


def test_push_to_hub_and_back(hub):
    model = tiny_mixture()
    address = model.push_to_hub("me/skills", private=True, token="secret", commit_message="First", revision="dev")
    assert address == "https://hub/commit"
    assert hub.calls == [("token", "secret"), ("create", "me/skills", True), ("upload", "me/skills", "First", "dev")]
    expected = ["README.md", "moe_config.json", "router.safetensors"]
    for name in model.expert_names:
        expected += [f"{name}/adapter_config.json", f"{name}/adapter_model.safetensors"]
    assert uploaded(hub, "me/skills") == sorted(expected)
    assert "mixture of 3 LoRA experts" in (hub.root / "me/skills/README.md").read_text()
    loaded = DyLoraMoE.from_pretrained("me/skills", base=tiny_base())
    assert_same_tensors(loaded.state_dict(), model.state_dict())


def test_saving_with_push_to_hub_uploads_the_mixture_and_nothing_else(hub, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "optimizer.pt").touch()
    (folder / "logs").mkdir()
    (folder / "logs" / "secret.json").touch()
    tiny_mixture().save_pretrained(folder, push_to_hub=True)
    assert hub.calls == [("token", None), ("create", "run", None), ("upload", "me/run", "Upload mixture", None)]
    assert len(uploaded(hub, "me/run")) == 9
    assert not any("optimizer" in name or "secret" in name for name in uploaded(hub, "me/run"))


def test_nothing_is_uploaded_unless_asked_for(hub, tmp_path):
    tiny_mixture().save_pretrained(tmp_path / "run", repo_id="me/run")
    assert hub.calls == []


def test_adapters_from_the_hub(hub):
    model = tiny_mixture()
    model.export_expert("red", hub.root / "somebody" / "sql")
    mixture = DyLoraMoE.from_adapters(tiny_base(), {"sql": "somebody/sql"}).eval()
    model.add_expert("guest", "somebody/sql")
    expected = logits(model, tokens(), experts="red")
    assert torch.equal(logits(mixture, tokens(), experts="sql"), expected)
    assert torch.equal(logits(model, tokens(), experts="guest"), expected)


def test_hub_without_an_adapter(hub):
    (hub.root / "somebody" / "model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        tiny_mixture().add_expert("guest", "somebody/model")


def test_skills_travel_with_the_mixture(hub):
    model = teach(mixture(), "sql")
    model.push_to_hub("me/taught")
    assert {"skills.json", "skills.safetensors"} <= set(uploaded(hub, "me/taught"))
    loaded = DyLoraMoE.from_pretrained("me/taught", base=tinybase.tiny_base())
    assert_same_tensors(loaded.skills.tensors(), model.skills.tensors())
