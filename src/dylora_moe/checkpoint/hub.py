"""Uploading a checkpoint to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from .mixture import OWN_FILES, saved_experts

OPTIONS = ("token", "private", "commit_message", "revision", "commit_description", "create_pr")
"""Arguments of `upload` that `save_pretrained` passes on."""


def upload(
    directory: Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    commit_description: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Upload a saved mixture to the Hugging Face hub; returns the commit's address."""
    api = HfApi(token=token)
    further = {"commit_description": commit_description, "create_pr": create_pr}
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        # the folder may also hold a trainer's states and logs
        allow_patterns=[*OWN_FILES, *(f"{name}/*" for name in saved_experts(directory))],
        commit_message=commit_message or "Upload mixture",
        revision=revision,
        **{key: value for key, value in further.items() if value is not None},
    )
