"""The `data` section of an expert in a recipe: where its examples come from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dylora_moe.schema import at_least, nearest

from .generated import SKILLS

SKILL_TRAIN_EXAMPLES = 1000
SKILL_TEST_EXAMPLES = 50
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
FORMS = (("messages",), ("prompt", "completion"), ("text",))
"""The fields of an example."""
TOOLS = "tools"
"""A field beside `messages`, and beside `prompt` and `completion` that are messages."""
_SPLIT = {"train": "split", "test": "test_split"}


@dataclass(frozen=True)
class DataRecipe:
    """Where one expert's examples come from: a generated skill, files, or a hub dataset (or a folder like one).

    Args:
        skill: a name in `generated.SKILLS`; `train` and `test` are then how many examples to generate.
        train: a file in one of `FILE_SUFFIXES` (relative to the recipe's folder, else to the current one), a pattern
            such as `data/*.jsonl`, a list of files and patterns, or a number with `skill`.
        test: the held-out examples, likewise.
        path: a hub dataset's id, or a local folder with one (looked up like a file).
        name: its configuration.
        split: the split to train on; default `train`.
        test_split: the held-out split.
        revision: commit, branch or tag on the hub.
        columns: our field (`prompt` and `completion`, `messages`, or `text`; `tools`) → the data's own name for it.
        template: our field (`prompt`, `completion` or `text`) → a Jinja template that makes it of a row's columns.
        test_columns: the `columns` of the held-out examples; default the same.
        test_template: the `template` of the held-out examples; default the same.
        filter: column → the value or values to keep; all must match.
        limit: read only the first so many training examples that pass the filter.
        test_limit: likewise of the held-out ones.
        weight: how much this data counts beside the other experts', see `examples.mix`.
        separator: what the completion begins with, between it and the prompt, where no chat template is used.
    """

    skill: str | None = None
    train: int | str | list[str] | None = None
    test: int | str | list[str] | None = None
    path: str | None = None
    name: str | None = None
    split: str | None = None
    test_split: str | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    template: dict[str, str] = field(default_factory=dict)
    test_columns: dict[str, str] | None = None
    test_template: dict[str, str] | None = None
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

    def columns_of(self, split: str) -> dict[str, str]:
        """The `columns` of `train` or `test`."""
        return self.test_columns if split == "test" and self.test_columns is not None else self.columns

    def template_of(self, split: str) -> dict[str, str]:
        """The `template` of `train` or `test`."""
        return self.test_template if split == "test" and self.test_template is not None else self.template

    @property
    def forms(self) -> set[str]:
        """The first field of each form that columns and templates name."""
        named = {key for split in ("train", "test") for key in (*self.columns_of(split), *self.template_of(split))}
        return {form[0] for form in FORMS if named & set(form)}

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
            if isinstance(value, str | list):
                raise ValueError(f"{key}={value!r} is a file, but `skill: {skill}` generates the examples.")
            if value is None:
                object.__setattr__(self, key, default)
        for key in ("limit", "test_limit"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is for files; with `skill` set `train` and `test` to the numbers wanted.")
        for key in ("columns", "template", "test_columns", "test_template", "filter"):
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
            if value == []:
                raise ValueError(f"{key}=[]: no file.")
            for file in [value] if isinstance(value, str) else value or []:
                if not file.endswith(FILE_SUFFIXES):
                    raise ValueError(f"{key}={file!r}: unknown kind of file; expected {', '.join(FILE_SUFFIXES)}.")

    def _check_columns(self) -> None:
        for split, prefix in (("train", ""), ("test", "test_")):
            columns, template = self.columns_of(split), self.template_of(split)
            _check_fields(columns, [TOOLS], f"{prefix}columns")
            _check_fields(template, [], f"{prefix}template", ("messages",))
            if both := set(columns) & set(template):
                raise ValueError(f"{', '.join(sorted(both))}: in columns and in template; give it once.")
            named = ({*columns} - {TOOLS}) | {*template}
            if named and not any(named <= set(form) for form in FORMS):
                raise ValueError(
                    f"{prefix}columns: {', '.join([*columns, *template])} do not go together; give prompt and "
                    "completion, messages, or text."
                )
            for key, text in template.items():
                _check_template(text, f"{prefix}template: {key}")
        if not self.has_test and (self.test_columns or self.test_template):
            raise ValueError("test_columns and test_template are for held-out data; add `test` or `test_split`.")
        for column, wanted in self.filter.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            if not values or not all(isinstance(value, (str, int, float)) for value in values):
                raise ValueError(
                    f"filter: {column}={wanted!r}: expected text, a number, true or false, or a list of them."
                )


def _check_fields(given: Iterable[str], beside: list[str], key: str, without: tuple[str, ...] = ()) -> None:
    known = [name for form in FORMS for name in form if name not in without] + beside
    for name in given:
        if name not in known:
            raise ValueError(f"{key}: no field {name!r}.{nearest(name, known)} Fields: {', '.join(known)}.")


def _check_template(text: str, key: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment().parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"{key}: no Jinja template ({error.message}, line {error.lineno}).") from error
