"""The stage that computes the router in place of training it: no optimizer, one look at the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dylora_moe.data.examples import Example
from dylora_moe.skills.reading import digest_of, read_rows


def fit_router(mixture: Any, examples: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Teach each expert of a mixture with a router in closed form what it is for.

    A frozen expert that was taught before stays as it is known, and rows that an expert was taught before do not count
    twice.

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
    new = {name: rows for name, rows in examples.items() if not _is_known(mixture, name, rows, tokenizer)}
    if new:
        separator = next(row.separator for rows in new.values() for row in rows)
        mixture.teach_many(new, tokenizer, separator)


def _is_known(mixture: Any, name: str, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an expert was taught these rows, or all it will be."""
    if name not in mixture.skills:
        return False
    digest = digest_of(read_rows(rows, tokenizer, chat=bool(mixture.chat)))
    return name in mixture.frozen_experts or digest in {one.sha256 for one in mixture.skills[name].taught}
