"""The router in closed form: who is taught, and which mixtures cannot be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dylora_moe.data.examples import Example
from dylora_moe.training.run.fit import fit_router

EXAMPLES = {"sql": [Example("a", "b")], "date": [Example("c", "d"), Example("e", "f")]}
TOKENIZER: Any = object()


def mixture(kind: str) -> SimpleNamespace:
    taught: list[Any] = []
    teach_many = lambda rows, tokenizer: taught.append((rows, tokenizer))  # noqa: E731
    return SimpleNamespace(moe_config=SimpleNamespace(router_type=kind), teach_many=teach_many, taught=taught)


def test_each_expert_is_taught_its_own_examples():
    model = mixture("closed_form")
    fit_router(model, EXAMPLES, TOKENIZER)
    assert model.taught == [(EXAMPLES, TOKENIZER)]  # at once


def test_a_router_that_is_trained_cannot_be_fitted():
    with pytest.raises(ValueError, match="a router of the type 'mlp'"):
        fit_router(mixture("mlp"), EXAMPLES, TOKENIZER)
