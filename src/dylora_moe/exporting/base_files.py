"""The files of a base: which its weights are, put into another folder, and the tokenizer that goes with them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dylora_moe.base.embedded import resolve_base
from dylora_moe.checkpoint.files import read_json

GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_TOKENIZER_KINDS = (".model", ".tiktoken")
_REMEDY = (
    "Write it with base.save_pretrained(folder), the tokenizer too, and load the mixture on that: base=folder, or "
    "--base on the command line"
)

logger = logging.getLogger(__name__)


class BaseFiles(NamedTuple):
    """A base as it lies on the disk.

    Attributes:
        folder: where.
        config: what its config.json holds.
        weights: names of the safetensors files that hold its weights.
        index: what the index of several such files holds; None for a single one.
    """

    folder: Path
    config: dict[str, Any]
    weights: tuple[str, ...]
    index: dict[str, Any] | None


def base_folder(base: PreTrainedModel, name: str | None) -> Path | None:
    """The local folder that a base was loaded from, the hub's cache included; None if there is none.

    A base that the library did not load does not say of which commit of a hub's repository it is: it is taken for the
    newest in the cache.
    """
    source = getattr(base, "name_or_path", "") or name
    if not source:
        return None
    folder = Path(resolve_base(source))
    if folder.is_dir():
        return folder
    try:
        commit = getattr(base.config, "_commit_hash", None)
        return Path(snapshot_download(source, revision=commit, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None


def read_base(base: PreTrainedModel, name: str | None) -> BaseFiles:
    """The files that hold the weights of `base`.

    Raises:
        ValueError: it was loaded from no local folder, or from one without safetensors.
        CheckpointError: the folder's config.json or index is missing or damaged.
    """
    folder = base_folder(base, name)
    if folder is None:
        called = f"the base {name!r}" if name else "the base, which has no name,"
        raise ValueError(f"{called} is no folder with files of weights on this machine. {_REMEDY}.")
    config = read_json(folder / "config.json")
    if (folder / SAFE_WEIGHTS_NAME).is_file():  # transformers looks for it first, too
        return BaseFiles(folder, config, (SAFE_WEIGHTS_NAME,), None)
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        raise ValueError(f"{folder} holds no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. {_REMEDY}.")
    index = read_json(folder / SAFE_WEIGHTS_INDEX_NAME)
    places = index.get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) and _are_texts(places.values()) else []
    for file in names or [""]:
        if file != Path(file).name or not file.endswith(".safetensors") or not (folder / file).is_file():
            raise ValueError(
                f"{folder / SAFE_WEIGHTS_INDEX_NAME} names {file!r:.60} as a file of weights, which is no "
                f"*.safetensors in {folder}. Download the base again."
            )
    return BaseFiles(folder, config, tuple(names), index)


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def check_held(files: BaseFiles, base: PreTrainedModel) -> None:
    """Raise `ValueError` if a tensor in the files is not what `base` holds, as far as names, shapes and a row show."""
    state = {key.replace(".base_layer.", "."): tensor for key, tensor in base.state_dict().items()}
    for name in files.weights:
        with safe_open(files.folder / name, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (it is no mapping)
                held = state.get(key, state.get(f"{base.base_model_prefix}.{key}"))
                part = opened.get_slice(key)
                if (
                    held is None
                    or not held.dim()
                    or not held.is_floating_point()
                    or list(held.shape) != part.get_shape()
                ):
                    continue  # named, fused or packed otherwise than in the file
                if not torch.equal(part[:1].to(held.dtype).float(), held[:1].cpu().float()):
                    raise ValueError(
                        f"{files.folder / name} holds other values of {key} than the mixture's base, which is "
                        f"another revision, or was changed after it was loaded. {_REMEDY}."
                    )


def put_weights(files: BaseFiles, folder: Path, copy: bool) -> None:
    """Hard-link the files of weights into `folder`; copy them if asked, or where the disk does not allow links."""
    linked = not copy
    for name in files.weights:
        file = (files.folder / name).resolve()  # in the hub's cache it is a symbolic link
        if linked:
            try:
                os.link(file, folder / name)
                continue
            except OSError as error:
                linked = False
                logger.warning("The base's weights are copied: no hard link to %s (%s).", file, error.strerror)
        shutil.copyfile(file, folder / name)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name is part of a tokenizer, its chat templates included."""
    return name in _TOKENIZER_FILES or name.endswith(_TOKENIZER_KINDS)


def copy_companions(sources: Collection[Path | None], folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings into `folder`.

    Args:
        sources: folders that may have them, the one that wins first. A tokenizer is taken from one of them only.
        folder: where to.
    """
    places = [source for source in sources if source is not None]
    tokenizer = next((source for source in places if (source / "tokenizer_config.json").is_file()), None)
    for entry in sorted(tokenizer.iterdir() if tokenizer else ()):
        if is_tokenizer_file(entry.name):
            (shutil.copytree if entry.is_dir() else shutil.copyfile)(entry, folder / entry.name)
    generation = next((source for source in places if (source / GENERATION_FILE).is_file()), None)
    if generation:
        shutil.copyfile(generation / GENERATION_FILE, folder / GENERATION_FILE)
