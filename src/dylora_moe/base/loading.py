"""Loading the frozen base, and checking that it is bare."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .embedded import resolve_base


def load_base(
    base: PreTrainedModel | str | os.PathLike[str], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, str | None]:
    """The base model and the name it is saved under (a local folder by its absolute path)."""
    if isinstance(base, str):
        name = str(Path(base).resolve()) if Path(base).is_dir() else base
        source = resolve_base(base)
        model = AutoModelForCausalLM.from_pretrained(source, **kwargs)
        if not Path(source).is_dir():
            _note_commit(model, source, kwargs)
        return model, name
    if isinstance(base, os.PathLike):
        return load_base(os.fspath(base), kwargs)
    if kwargs:
        raise ValueError(f"{sorted(kwargs)} are loading options, but the base is loaded already.")
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"the base must be a transformers causal language model or its name, not {type(base).__name__}."
        )
    return base, None


def _note_commit(model: PreTrainedModel, name: str, kwargs: dict[str, Any]) -> None:
    """Let the configuration say of which commit of a hub's repository it is; transformers 5 does not any more."""
    try:
        file = try_to_load_from_cache(name, "config.json", kwargs.get("cache_dir"), kwargs.get("revision"))
    except ValueError:  # no name of a repository
        return
    if isinstance(file, str):
        model.config._commit_hash = Path(file).parent.name


def load_tokenizer(folder: str | Path | None, base_name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a checkpoint's folder, else the base's.

    Args:
        folder: of the checkpoint, if there is one.
        base_name: of the base: its name or folder, if it is known.

    Raises:
        OSError, ValueError: it cannot be loaded.
    """
    own = folder is not None and (Path(folder) / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(str(folder) if own else resolve_base(base_name or ""))


@contextmanager
def without_notes_for_peft() -> Iterator[None]:
    """Within the block PEFT may read an attribute of the base that transformers has renamed, without its note."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def accept_in_pipelines(model: type) -> None:
    """Count a class among those that `transformers.pipeline` knows to generate text; it looks them up by name."""
    from transformers.pipelines import base

    names = getattr(base, "SUPPORTED_PEFT_TASKS", {}).get("text-generation", [])  # without it pipelines only complain
    if model.__name__ not in names:
        names.append(model.__name__)


def check_bare(base: nn.Module) -> None:
    """Raise `ValueError` if `base` carries adapters already (they would be mixed in silently), or is offloaded."""
    for path, module in base.named_modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"{path} of the base is offloaded to the CPU or disk, where PEFT places new adapters wrongly; choose a "
                "device_map of devices only, or load the base in 4 bit."
            )
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"the base carries adapters already (at {path}); take it back bare with unload(), or load it again."
            )


def strip_adapters(base: nn.Module) -> None:
    """Put the base's own layers back where PEFT wrapped them; what a failed build leaves behind."""
    for path, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(path, module.get_base_layer())
    base.__dict__.pop("peft_config", None)
