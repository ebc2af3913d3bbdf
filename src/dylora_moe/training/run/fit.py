"""The stage that computes the router in place of training it: no optimizer, one look at the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dylora_moe.data.examples import Example


def fit_router(mixture: Any, examples: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Teach each expert of a mixture with a router in closed form what it is for.

    Args:
        mixture: its experts are trained.
        examples: expert → its training examples.
        tokenizer: of the base.

    Raises:
        ValueError: the mixture has a router that is trained.
    """
    kind = mixture.moe_config.router_type
    if kind != "closed_form":
        raise ValueError(
            f"train.router: closed_form, but the mixture that the run goes on with has a router of the type {kind!r}, "
            "which is trained; set train.router: trained and router_steps."
        )
    mixture.teach_many(examples, tokenizer=tokenizer)
