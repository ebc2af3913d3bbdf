"""The router in closed form: who is taught, who is not again, and which mixtures cannot be."""

from __future__ import annotations

import pytest

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.skills.reading import examples_of
from dylora_moe.training.run.fit import fit_router
from tinybase import tiny_base, tiny_tokenizer
from topics import NAMES, mixture, texts

EXAMPLES = {name: examples_of(texts(topic, 4), " ") for topic, name in enumerate(NAMES[:3])}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def rows(model: DyLoraMoE) -> dict[str, int]:
    return {name: skill.rows for name, skill in model.skills.items()}


def test_each_expert_is_taught_its_own_examples():
    model = mixture(NAMES[:3])
    fit_router(model, EXAMPLES, tiny_tokenizer())
    assert rows(model) == dict.fromkeys(NAMES[:3], 4)
    assert model.skills.reading is not None
    assert model.skills.reading.separator == " "


def test_what_is_known_does_not_count_twice():
    model, tokenizer = mixture(NAMES[:3]), tiny_tokenizer()
    fit_router(model, {name: EXAMPLES[name] for name in NAMES[:2]}, tokenizer)
    model.freeze_expert("law")
    other = examples_of(texts(NAMES.index("law"), 5, seed=1), " ")
    fit_router(
        model, {**EXAMPLES, "law": other}, tokenizer
    )  # the same rows of sql, others of a frozen law, new of math
    assert rows(model) == dict.fromkeys(NAMES[:3], 4)
    more = examples_of(texts(NAMES.index("sql"), 5, seed=1), " ")
    fit_router(model, {"sql": more}, tokenizer)
    assert rows(model)["sql"] == 9


def test_a_router_that_is_trained_cannot_be_fitted():
    model = DyLoraMoE(tiny_base(), MoELoraConfig(expert_names=["sql"], target_modules=["q_proj"], router_layer=1))
    with pytest.raises(ValueError, match="a router of the type 'mlp'"):
        fit_router(model, EXAMPLES, tiny_tokenizer())
