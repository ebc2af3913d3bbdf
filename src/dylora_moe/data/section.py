"""The `data` section of an expert in a recipe: where its examples come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dylora_moe.schema import at_least, nearest

from .generated import SKILLS

SKILL_TRAIN_EXAMPLES = 1000
SKILL_TEST_EXAMPLES = 50
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz")
FORMS = (("messages",), ("prompt", "completion"), ("text",))  # the fields of an example; the first form present counts
_SPLIT = {"train": "split", "test": "test_split"}


@dataclass(frozen=True)
class DataRecipe:
    """Where one expert's examples come from: a generated skill, files, or a hub dataset (or a folder like one).

    Args:
        skill: a name in `generated.SKILLS`; `train` and `test` are then how many examples to generate.
        train: a file in one of `FILE_SUFFIXES` (relative to the recipe's folder, else to the current one), or a
            number with `skill`.
        test: the held-out examples, likewise.
        path: a hub dataset's id, or a local folder with one (looked up like a file).
        name: its configuration.
        split: the split to train on; default `train`.
        test_split: the held-out split.
        revision: commit, branch or tag on the hub.
        columns: our field (`prompt` and `completion`, `messages`, or `text`) → the data's own name for it.
        filter: column → the value or values to keep; all must match.
        limit: read only the first so many training examples that pass the filter.
        test_limit: likewise of the held-out ones.
        weight: how much this data counts beside the other experts', see `examples.mix`.
        separator: what the completion begins with, between it and the prompt, where no chat template is used.
    """

    skill: str | None = None
    train: int | str | None = None
    test: int | str | None = None
    path: str | None = None
    name: str | None = None
    split: str | None = None
    test_split: str | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    filter: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    test_limit: int | None = None
    weight: float = 1.0
    separator: str = "\n"

    def __post_init__(self):
        for key in ("train", "test", "limit", "test_limit"):
            at_least(self, key, 1)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight}: must be greater than 0; leave the expert out to give it no data.")
        self._check_source()
        self._check_columns()
        if self.test_limit is not None and self.test is None and self.test_split is None:
            raise ValueError(f"test_limit={self.test_limit} without held-out data; add `test` or `test_split`.")

    @property
    def has_test(self) -> bool:
        """Whether there is held-out data."""
        return self.test is not None or self.test_split is not None

    def _check_source(self) -> None:
        sources = {key: getattr(self, key) for key in ("skill", "path") if getattr(self, key) is not None}
        if len(sources) == 2:
            raise ValueError(f"skill={self.skill!r} and path={self.path!r}: give one source of examples.")
        if self.skill is not None:
            self._check_skill(self.skill)
        elif self.path is not None:
            for key in ("train", "test"):
                if (value := getattr(self, key)) is not None:
                    raise ValueError(
                        f"{key}={value!r} beside path={self.path!r}; choose its part with `{_SPLIT[key]}`."
                    )
            if self.split is None:
                object.__setattr__(self, "split", "train")
        else:
            self._check_files()
        if self.path is None:
            for key in ("name", "split", "test_split", "revision"):
                if (value := getattr(self, key)) is not None:
                    raise ValueError(f"{key}={value!r} is for a dataset; give its id or folder as `path`.")

    def _check_skill(self, skill: str) -> None:
        if skill not in SKILLS:
            known = ", ".join(SKILLS)
            raise ValueError(f"unknown skill {skill!r}.{nearest(skill, SKILLS)} Skills: {known}.")
        for key, default in (("train", SKILL_TRAIN_EXAMPLES), ("test", SKILL_TEST_EXAMPLES)):
            value = getattr(self, key)
            if isinstance(value, str):
                raise ValueError(f"{key}={value!r} is a file, but `skill: {skill}` generates the examples.")
            if value is None:
                object.__setattr__(self, key, default)
        for key in ("limit", "test_limit"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is for files; with `skill` set `train` and `test` to the numbers wanted.")
        for key in ("columns", "filter"):
            if value := getattr(self, key):
                raise ValueError(f"{key}={value!r} is for files and datasets; `skill: {skill}` has no columns.")

    def _check_files(self) -> None:
        if self.train is None:
            raise ValueError(
                "no data: give `train: FILE.jsonl`, `path: DATASET`, or `skill: NAME` for generated examples."
            )
        for key in ("train", "test"):
            value = getattr(self, key)
            if isinstance(value, int):
                raise ValueError(f"{key}={value} is a number of examples, which needs `skill: NAME`.")
            if value is not None and not value.endswith(FILE_SUFFIXES):
                raise ValueError(f"{key}={value!r}: unknown kind of file; expected {', '.join(FILE_SUFFIXES)}.")

    def _check_columns(self) -> None:
        known = [name for form in FORMS for name in form]
        for key in self.columns:
            if key not in known:
                raise ValueError(f"columns: no field {key!r}.{nearest(key, known)} Fields: {', '.join(known)}.")
        if self.columns and not any(set(self.columns) <= set(form) for form in FORMS):
            raise ValueError(
                f"columns: {', '.join(self.columns)} do not go together; give prompt and completion, messages, or text."
            )
        for column, wanted in self.filter.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            if not values or not all(isinstance(value, (str, int, float)) for value in values):
                raise ValueError(
                    f"filter: {column}={wanted!r}: expected text, a number, true or false, or a list of them."
                )
