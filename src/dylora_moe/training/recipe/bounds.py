"""Values that the trainer's own arguments can have, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dylora_moe.schema import RecipeError, nearest

_AT_LEAST_ONE = (lambda value: value >= 1, "must be 1 or more")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "must be a finite number, 0 or more")
_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "per_device_train_batch_size": _AT_LEAST_ONE,
    "per_device_eval_batch_size": _AT_LEAST_ONE,
    "max_length": _AT_LEAST_ONE,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "label_smoothing_factor": (lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    "max_steps": (lambda value: value == -1 or value >= 1, "must be 1 or more, or -1 for num_train_epochs to decide"),
    "num_train_epochs": (lambda value: 0 < value < math.inf, "must be greater than 0"),
    "loss_type": (lambda value: value in ("nll", "dft"), "must be nll or dft"),
}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise a `RecipeError` for the first of the trainer's arguments in a recipe whose value cannot be used."""
    for key, (allowed, words) in _BOUNDS.items():
        value = arguments.get(key)
        if value is not None and not allowed(value):
            raise RecipeError(f"train.{key}={value}: {words}.")
    for name in _as_list(arguments.get("report_to")):
        _check_logger(name)


def _check_logger(name: str) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    if name not in known:
        raise RecipeError(
            f"train.report_to: unknown logger {name!r}.{nearest(name, known)} Known: {', '.join(sorted(known))}."
        )


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
