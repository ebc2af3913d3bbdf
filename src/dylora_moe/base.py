"""Loading the frozen base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from .embedded import resolve_base


def load_base(base: PreTrainedModel | str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, str | None]:
    """The base model and the name it is saved under (a local folder by its absolute path)."""
    if isinstance(base, str):
        name = str(Path(base).resolve()) if Path(base).is_dir() else base
        return AutoModelForCausalLM.from_pretrained(resolve_base(base), **kwargs), name
    if kwargs:
        raise ValueError(f"{sorted(kwargs)} are loading options, but the base is loaded already.")
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"the base must be a transformers causal language model or its name, not {type(base).__name__}."
        )
    return base, None
