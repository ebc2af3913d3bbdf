"""The model names that stand for a mixture and its experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dylora_moe.arguments import BASE

from .errors import ApiError


def model_names(name: str, experts: Iterable[str]) -> dict[str, str | None]:
    """Model name → expert to force, None for the routed mixture, which is called `name`."""
    return {name: None, f"{name}:{BASE}": BASE} | {f"{name}:{expert}": expert for expert in experts}


def expert_named(model: str, names: Mapping[str, str | None]) -> str | None:
    """The expert that a model name forces, None for the routed mixture.

    Raises:
        ApiError: 404, with the names there are.
    """
    if model not in names:
        raise ApiError(404, f"no model {model[:200]!r}; there are {', '.join(names)}.", "model", "model_not_found")
    return names[model]


def described(name: str) -> dict[str, Any]:
    """A model as `/v1/models` tells it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "dylora-moe"}
