"""What rows are to a mixture: of a skill that it has, new, or too short to say; and which of them a new skill is of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.examples import Example, encode
from dylora_moe.model import DyLoraMoE
from dylora_moe.skills.features import positions_of
from dylora_moe.skills.novelty import KNOWN, NEW, TOO_SHORT, Novelty
from dylora_moe.skills.reading import check_plain, examples_of

from .split import proposal, split

FEWEST_ROWS = 8
"""Fewer rows train no expert and make no skill."""
FEW_ROWS = 40
"""With fewer the router and novelty know a skill badly."""


@dataclass(frozen=True)
class Look:
    """What some rows are to a mixture.

    Attributes:
        examples: the rows that can be used, each once, long texts in pieces.
        answers: what each of them is.
        whole: what they are together.
        states: float64 `[N, D]`, the mean state of each by which it is routed.
        twice: rows that were left out because they are there before.
        too_long: rows that were left out because prompt and completion do not fit.
    """

    examples: tuple[Example, ...]
    answers: tuple[Novelty, ...]
    whole: Novelty
    states: Tensor
    twice: int = 0
    too_long: int = 0

    @property
    def known(self) -> dict[str, int]:
        """Skill → how many rows are of it, most first."""
        found = Counter(str(answer.skill) for answer in self.answers if answer.answer == KNOWN)
        return dict(found.most_common())

    @property
    def counts(self) -> dict[str, int]:
        """Answer, with the skill where it is of one, → how many rows have it, most first."""
        found = Counter(a.answer if a.answer in (NEW, TOO_SHORT) else f"{a.answer}: {a.skill}" for a in self.answers)
        return dict(found.most_common())

    @property
    def new(self) -> tuple[Example, ...]:
        """The rows that are of no skill."""
        pairs = zip(self.examples, self.answers, strict=True)
        return tuple(example for example, answer in pairs if answer.answer != KNOWN)

    def parts(self, count: int | None = None) -> list[tuple[Example, ...]]:
        """The new rows by skill, largest first.

        Args:
            count: of skills; default as many as lie apart.
        """
        if not self.new:
            return []
        states = self.states[torch.tensor([answer.answer != KNOWN for answer in self.answers])]
        groups = (proposal(states, FEWEST_ROWS) if count is None else split(states, count)).tolist()
        found = range(max(groups) + 1)
        return [tuple(e for e, own in zip(self.new, groups, strict=True) if own == group) for group in found]

    @property
    def reason(self) -> str | None:
        """Why nothing is to be learnt of these rows; None if something is."""
        if len(self.new) >= FEWEST_ROWS:
            return None
        if len(self.examples) < FEWEST_ROWS:
            return f"{_rows(len(self.examples))} make no skill: {FEWEST_ROWS} are needed, {FEW_ROWS} or more are good"
        skills = " and ".join(f"{name} ({_rows(count)})" for name, count in self.known.items())
        left = f"; {_rows(len(self.new))} of no skill are too few" if self.new else ""
        return f"nothing new: the rows are of {skills}{left}"


def look(
    mixture: DyLoraMoE,
    rows: Iterable[str | Mapping[str, Any] | Example],
    tokenizer: PreTrainedTokenizerBase,
    separator: str | None = None,
    false_alarm: float = 0.01,
    max_length: int = 1024,
) -> Look:
    """What `rows` are to the skills of a mixture; nothing is changed.

    Args:
        mixture: with any router.
        rows: texts, or mappings with `prompt` and `completion`.
        tokenizer: of the base.
        separator: what stands between prompt and completion; default as the mixture was taught.
        false_alarm: share of the rows of known skills that may be called new.
        max_length: tokens of a row, and no more than the base has positions for; plain text that is longer is cut into
            pieces, other rows are left out.

    Raises:
        ValueError: no rows, unusable ones, or none that fits.
    """
    separator = mixture.skills.separator if separator is None else separator
    given = examples_of(rows, separator)
    check_plain(given, bool(mixture.chat))
    max_length = min(max_length, positions_of(mixture.get_base_model()) or max_length)
    once = list({(str(e.prompt), str(e.completion), str(e.template)): e for e in reversed(given)}.values())[::-1]
    fitting = [piece for example in once for piece in _pieces(example, tokenizer, bool(mixture.chat), max_length)]
    if not fitting:
        raise ValueError(
            f"none of the {_rows(len(once))} fits into max_length={max_length} tokens; shorten them, or raise it, at "
            "most to the base's context."
        )
    too_long = len(once) - len({id(example) for example, _ in fitting})
    examples = tuple(piece for _, piece in fitting)
    states = mixture.views(examples, tokenizer, separator, sums=True).deciding  # read once, for all that follows
    how = {"tokenizer": tokenizer, "separator": separator, "false_alarm": false_alarm}
    if mixture.skills:
        answers, whole = mixture.novelty(examples, **how), mixture.novelty(examples, batch=True, **how)
    else:
        whole = Novelty(NEW, "", 0.0, math.inf)  # to one that knows nothing everything is
        answers = [whole] * len(examples)
    return Look(examples, tuple(answers), whole, states, len(given) - len(once), too_long)


def _pieces(
    example: Example, tokenizer: PreTrainedTokenizerBase, chat: bool, max_length: int
) -> Sequence[tuple[Example, Example]]:
    """The example beside each of the pieces that it is read in; none where it does not fit."""
    ids, _ = encode(example, tokenizer, chat)
    if len(ids) <= max_length:
        return [(example, example)]
    if example.form != "text" or not tokenizer.is_fast:  # only fast ones say where in the text a token is
        return []
    text: Any = example.completion
    spans: Any = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    cuts = [spans[start][0] for start in range(0, len(spans), max(max_length - 2, 1))]  # each closed by one token more
    pieces = [text[start:end] for start, end in pairwise([*cuts, len(text)])]
    return [(example, replace(example, completion=piece)) for piece in pieces if piece.strip()]


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
