"""The library of skills: what a mixture was taught, kept as sums, from which its router is computed.

It goes with the experts (renamed, forgotten with them), is saved beside them and merges with another by addition.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .closed_form import SEQUENCE, Fit, Pool, fit, left_out
from .reading import SEPARATOR, Reading
from .separation import nearest
from .skill import VIEWS, RowViews, Skill, Teaching
from .sums import Sums

COMPACT_ROWS = 32
"""Rows of a skill whose views a compact library keeps."""
_MEAN, _SCATTER, _DECIDING = "mean", "scatter", "deciding_mean"
_KEYS, _COUNTS, _VIEWS = "row_keys", "row_counts", "row_views"
_POOL, _POOL_ROWS = "pool", "pool_rows"


class SkillLibrary(Mapping[str, Skill]):
    """What a mixture knows of its skills: name → `Skill`.

    Changing it changes no router: that is for the mixture's `teach`, `forget` and `merge_skills`, which use it.

    Attributes:
        reading: how the texts were read; None while it is empty.
        pool: the scatters that `compact` put together, or None.
    """

    def __init__(self, reading: Reading | None = None):
        self.reading = reading
        self.pool: Pool | None = None
        self._skills: dict[str, Skill] = {}

    def __getitem__(self, name: str) -> Skill:
        return self._skills[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._skills)

    def __len__(self) -> int:
        return len(self._skills)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {skill.rows} rows" for name, skill in self.items())
        return f"SkillLibrary({rows or 'empty'})"

    @property
    def size(self) -> int:
        """Bytes of what it keeps."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def separator(self) -> str:
        """What stands between prompt and completion of its texts, or would where nothing was taught yet."""
        return SEPARATOR if self.reading is None else self.reading.separator

    @property
    def is_compact(self) -> bool:
        """Whether some scatter was put together with others'."""
        return self.pool is not None

    def copy(self) -> SkillLibrary:
        """Another library with the same content, which is never changed itself."""
        other = SkillLibrary(self.reading)
        other.pool, other._skills = self.pool, dict(self._skills)
        return other

    # ------------------------------------------------------------------ changing it

    def add(self, name: str, skill: Skill, reading: Reading) -> None:
        """Add what was read of rows to the skill `name`, or a new one.

        Raises:
            ValueError: the rows were read otherwise, or the skill was compacted.
        """
        self.check_can_add(name, reading)
        if name in self._skills:
            skill = self._skills[name] + skill
        self.reading = reading
        self._skills[name] = skill

    def check_can_add(self, name: str, reading: Reading) -> None:
        """Raise `ValueError` if rows that are read so cannot be added to the skill `name`."""
        self.check_reading(reading, "these rows were read")
        if name in self._skills:
            self._check_open(name, "teach it again")

    def forget(self, name: str, exact: bool = True) -> None:
        """Take a skill out.

        Args:
            name: of the skill.
            exact: as if it had never been there; False leaves its share of a compact library's pool where it is.

        Raises:
            ValueError: there is no such skill, or its scatter cannot be taken out of the pool.
        """
        self._check_known(name)
        if exact:
            self._check_open(name, "forget it as if it had never been there (exact=False leaves its share of the pool)")
        del self._skills[name]
        if not self._skills:
            self.reading = self.pool = None

    def rename(self, old: str, new: str) -> None:
        """Give a skill another name."""
        self._check_known(old)
        if new in self._skills:
            raise ValueError(f"the library has a skill {new!r} already.")
        self._skills = {new if name == old else name: skill for name, skill in self._skills.items()}

    def unite(self, names: Sequence[str], name: str) -> None:
        """Make one skill of several, as if all their rows had been taught to it.

        Args:
            names: of the skills; those that are not there count for nothing.
            name: of the one skill.

        Raises:
            ValueError: there is another skill of this name, or one of several was compacted; nothing is changed.
        """
        if name in self._skills and name not in names:
            raise ValueError(f"the library has a skill {name!r} already.")
        parts = [each for each in names if each in self._skills]
        for part in parts if len(parts) > 1 else ():
            self._check_open(part, "merge it with another")
        skills = [self._skills.pop(part) for part in parts]
        if skills:
            self._skills[name] = reduce(operator.add, skills)

    def merge(self, other: SkillLibrary) -> None:
        """Add all skills of another library; skills of the same name become one.

        Raises:
            ValueError: the texts were read otherwise, or a skill of both was compacted in one; nothing is changed.
        """
        if other.reading is None:
            return
        self.check_reading(other.reading, "the other's were read")
        for name in self._skills.keys() & other._skills.keys():
            self._check_open(name, "merge it with another")
            other._check_open(name, "merge it with another")
        self.reading = other.reading
        for name, skill in other._skills.items():
            self._skills[name] = self._skills[name] + skill if name in self._skills else skill
        if other.pool is not None:
            self.pool = other.pool if self.pool is None else self.pool + other.pool

    def compact(self) -> None:
        """Put the scatters of all skills together and keep fewer rows: the same router in a fraction of the bytes.

        Such a skill cannot be taught again, merged with the same skill or forgotten exactly any more.
        """
        own = {name: skill for name, skill in self._skills.items() if not skill.compact}
        if not own:
            return
        added = Pool.of([own[name] for name in sorted(own)], len(next(iter(own.values())).sums.mean))
        self.pool = added if self.pool is None else self.pool + added
        self._skills = {name: skill.compacted(COMPACT_ROWS) for name, skill in self._skills.items()}

    # ------------------------------------------------------------------ what is read from it

    def fit(self, scored: str = SEQUENCE) -> Fit:
        """The router for its skills, see `closed_form.fit`."""
        return fit(self._skills, self.pool, scored)

    def left_out(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        """How each kept row would be scored by a router that had never seen it, see `closed_form.left_out`."""
        return left_out(self._skills, self.pool)

    def confusion(self) -> dict[str, dict[str, int]]:
        """Skill → skill → how many of the kept rows would go there, each by a router that had never seen it."""
        table = {}
        for name, (scores, columns) in self.left_out().items():
            counts = torch.bincount(scores.argmax(-1), minlength=len(columns)).tolist()
            table[name] = dict(zip(columns, counts, strict=True))
        return table

    def separation(self, *names: str) -> dict[str, tuple[str, float]]:
        """Skill → the one nearest to it and how far they are apart: below 2 they are the same (`separation.py`).

        Args:
            names: of the skills that it is asked for; default all.
        """
        return nearest(self._skills, names or tuple(self._skills))

    def sizes(self) -> dict[str, int]:
        """Skill → bytes of what is kept of it alone."""
        tensors = self.tensors()
        return {name: sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}.")) for name in self}

    # ------------------------------------------------------------------ as plain data

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is numbers, by `skill.what`."""
        found = {}
        for name, skill in self._skills.items():
            parts = {_MEAN: skill.sums.mean, _SCATTER: skill.sums.scatter, _DECIDING: skill.deciding_mean}
            parts |= {_KEYS: skill.views.keys, _COUNTS: skill.views.counts, _VIEWS: skill.views.states}
            found |= {f"{name}.{key}": value for key, value in parts.items() if value is not None}
        return found if self.pool is None else {**found, _POOL: self.pool.scatter, _POOL_ROWS: self.pool.rows}

    def description(self) -> dict[str, Any]:
        """Everything else, ready for JSON."""
        return {
            "reading": None if self.reading is None else asdict(self.reading),
            "pooled_skills": 0 if self.pool is None else self.pool.skills,
            "skills": {
                name: {
                    "tokens": skill.tokens,
                    "weight": skill.sums.weight,
                    "rows": skill.rows,
                    "compact": skill.compact,
                    "taught": [teaching._asdict() for teaching in skill.taught],
                }
                for name, skill in self._skills.items()
            },
        }

    @classmethod
    def from_plain(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> SkillLibrary:
        """The library of `tensors()` and `description()`.

        Raises:
            ValueError: they do not belong together; the message says where.
        """
        try:
            reading = description["reading"]
            known = None if reading is None else Reading(**reading)
            skills, pooled = dict(description["skills"]), int(description["pooled_skills"])
            listed = {
                name: (int(s["tokens"]), int(s["rows"]), float(s["weight"]), bool(s["compact"]))
                for name, s in skills.items()
            }
            taught = {name: tuple(Teaching(**each) for each in s["taught"]) for name, s in skills.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"it does not describe a library of skills: {type(error).__name__}: {error}.") from error
        kinds = {field.name: {"str": str, "int": int}[str(field.type)] for field in fields(Reading)}
        if known is not None and any(type(getattr(known, name)) is not kind for name, kind in kinds.items()):
            raise ValueError(f"reading is {reading!r:.80}; expected {', '.join(kinds)}.")
        if known is None and (listed or pooled):
            raise ValueError("there are skills, but not how they were read.")
        library, width = cls(known), 0 if known is None else known.width
        left = dict(tensors)
        packed = (width * (width + 1) // 2,)
        for name, (tokens, rows, weight, compact) in listed.items():
            mean = _take(left, f"{name}.{_MEAN}", torch.float64, (width,))
            scatter = None if compact else _take(left, f"{name}.{_SCATTER}", torch.float64, packed)
            deciding = _take(left, f"{name}.{_DECIDING}", torch.float64, (width,))
            keys = _take(left, f"{name}.{_KEYS}", torch.int64, (None,))
            counts = _take(left, f"{name}.{_COUNTS}", torch.int64, (len(keys), 2))
            states = _take(left, f"{name}.{_VIEWS}", torch.float16, (len(keys), None, width))
            if states.shape[1] != len(VIEWS):
                raise ValueError(
                    f"{name}.{_VIEWS} has {states.shape[1]} views of each row; expected {len(VIEWS)} "
                    f"({', '.join(VIEWS)}). It was made by another version."
                )
            if tokens < 1 or rows < 1 or not weight > 0 or bool((counts < 0).any()) or bool((counts.sum(-1) < 1).any()):
                raise ValueError(f"skill {name!r} has {tokens} tokens of {rows} rows; expected at least one.")
            sums, views = Sums(weight, mean, scatter), RowViews(keys, counts, states)
            library._skills[name] = Skill(sums, deciding, rows, tokens, views, taught[name])
        if pooled:
            scatter, rows = (_take(left, key, torch.float64, packed) for key in (_POOL, _POOL_ROWS))
            library.pool = Pool(scatter, rows, pooled)
        elif any(compact for *_, compact in listed.values()):
            raise ValueError("there are compact skills, but no pool of their scatters.")
        if left:
            raise ValueError(f"{len(left)} tensors belong to no skill, first {next(iter(left))}.")
        return library

    # ------------------------------------------------------------------ checks

    def check_reading(self, other: Reading, what: str) -> None:
        """Raise `ValueError` if `what` (`"these rows were read"`) was done in another way than its texts."""
        if self.reading is not None and self.reading != other:
            raise ValueError(
                f"the library's texts and {what} in another way ({'; '.join(self.reading.differences(other))}), so "
                "that their sums do not belong together; forget all skills and teach them anew."
            )

    def is_of_another(self, base: Any) -> bool:
        """Whether its texts were read with a base of other weights than those of `base`, as far as can be told."""
        return self.reading is not None and self.reading.has_other_weights(base)

    def _check_known(self, name: str) -> None:
        if name not in self._skills:
            raise ValueError(f"unknown skill {name!r}; the skills are {', '.join(self._skills) or 'none'}.")

    def _check_open(self, name: str, what: str) -> None:
        if self._skills[name].compact:
            raise ValueError(f"skill {name!r} is compact: its scatter is pooled with others', so one cannot {what}.")


def _take(tensors: dict[str, Tensor], key: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    """A tensor of a file out of those that are left, checked."""
    if key not in tensors:
        raise ValueError(f"{key} is missing; the file is damaged, or another version wrote it.")
    tensor = tensors.pop(key)
    fits = len(tensor.shape) == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise ValueError(f"{key} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}.")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{key} holds values that are not finite.")
    return tensor
