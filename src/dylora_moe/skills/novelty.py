"""Whether texts are of a kind that a mixture was taught, or new.

A text is seen by the means of its states: of its prompt where it enters layer k // 2 and layer k, and of its completion
at k. For each such view a skill with mean μ_e of n rows is as far from x, the mean of m rows, as

    ratio_e(x) = log (x − μ_e)ᵀ W⁻¹ (x − μ_e) / (1/m + 1/n) − log (x − μ)ᵀ T⁻¹ (x − μ)

W is how rows vary within skills, every skill weighing the same, T how all rows do around their mean μ, both shrunk (Ren
et al. 2021, arXiv 2106.09022, take the difference of the distances). The score is the mean over the views, of the skill
where it is least. A background of generic texts counts in W, T and μ like one more skill, but is no answer.

What a score means is said by the scores of the kept rows, each with its own part taken out of means, W and T (exactly,
for the same shrinkage and weights of the rest: Sherman, Morrison, Woodbury): p is the share of them that is as high, as
in split conformal prediction (Vovk, Gammerman, Shafer 2005). Of texts like those taught, a share of at most p has so
small a p. That is a rate over all skills together, not of each, and says nothing of texts that are unlike any of them.

Shapes: N rows, C classes, which are E skills and the background, G groups of g rows, V views, D width of a state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .skill import VIEWS, RowViews, Skill

KNOWN, RELATED, NEW, TOO_SHORT = "known", "related", "new", "too short to say"
SHRINKAGE = 0.1
"""Share of the mean variance that is added to every direction."""
FALSE_ALARM = 0.01
"""Share of known texts that are called new."""
RELATED_WITHIN = 5
"""Related is what would be new if so many times as many false alarms were allowed."""
SHORT = 32
"""Tokens below which a row is too short to be called new, if hardly any row of the nearest skill is so short."""
HARDLY_ANY = 0.05
"""Share of a skill's rows."""
_VIEWS = ("early", "prompt", "completion")
_TINY = torch.finfo(torch.float64).tiny

logger = logging.getLogger(__name__)


class Novelty(NamedTuple):
    """What is said of a text, or of a batch of them.

    Attributes:
        answer: `KNOWN`, `RELATED`, `NEW` or `TOO_SHORT`.
        skill: the nearest, whatever the answer.
        p: the share of known texts that would look as new.
        score: the higher the newer; of one library's only.
    """

    answer: str
    skill: str
    p: float
    score: float

    def __str__(self) -> str:
        if self.answer == TOO_SHORT:
            return self.answer
        p = f"(p={self.p:.2g})"
        return f"{self.answer} {p}" if self.answer == NEW else f"{self.answer}: {self.skill} {p}"


class _Seen(NamedTuple):
    """`means [·, V, D]` of rows or batches, and of how many rows each is: `counts [·, V]`, 0 for none; float64."""

    means: Tensor
    counts: Tensor


class _Cloud(NamedTuple):
    """Rows around centres: of their classes, or of all.

    Attributes:
        whiten: float64 `[D, D]`, by which x becomes one whose squared length is its distance.
        centres: `[C, D]` (or `[1, D]`), whitened.
        counts: `[C]` rows of each.
        shares: `[C]`, of one row of each in the covariance.
    """

    whiten: Tensor
    centres: Tensor
    counts: Tensor
    shares: Tensor

    @classmethod
    def of(cls, rows: Tensor, classes: Tensor, count: int) -> _Cloud:
        """Of `rows [N, D]` of the `classes [N]` 0 … count − 1, some of which may have none; each weighs the same."""
        counts = torch.bincount(classes, minlength=count)
        centres = rows.new_zeros(count, rows.shape[1]).index_add_(0, classes, rows) / counts.clamp(min=1)[:, None]
        shares = 1 / (counts.clamp(min=1) * (counts > 0).sum()).double()
        apart = rows - centres[classes]
        covariance = (apart * shares[classes, None]).T @ apart
        covariance.diagonal().add_(SHRINKAGE * (float(covariance.trace()) / len(covariance) or 1.0))
        lower = torch.linalg.cholesky(covariance)
        whiten = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False).T
        return cls(whiten.contiguous(), centres @ whiten, counts, shares)

    def distances(self, means: Tensor) -> Tensor:
        """`[·, C]` of `means [·, D]`."""
        return (
            torch.cdist(means @ self.whiten, self.centres, compute_mode="donot_use_mm_for_euclid_dist")
            .square()
            .clamp(min=_TINY)
        )

    def distances_without(self, rows: Tensor, groups: Tensor, own: int) -> Tensor:
        """`[G, C]` of the means of `groups [G, g]` of the `rows [·, D]` of a class, each with its rows taken out.

        Of n rows n − g are left: what is taken out of the scatter is Σ_i u_i u_iᵀ + g² / (n − g) ū ūᵀ, where u_i are
        the rows and ū their mean as seen from the centre, which moves by − g / (n − g) ū.
        """
        size, left = groups.shape[1], int(self.counts[own]) - groups.shape[1]
        apart = (rows @ self.whiten - self.centres[own])[groups]
        mean = apart.mean(1, keepdim=True)
        taken = torch.cat([apart, mean * (size / left**0.5)], dim=1) * self.shares[own].sqrt()  # [G, g+1, D]
        to_centres = mean + self.centres[own] - self.centres  # [G, C, D]
        to_centres[:, own] = mean[:, 0] * (1 + size / left)
        along = taken @ to_centres.mT
        inner = torch.eye(size + 1, dtype=taken.dtype) - taken @ taken.mT
        return (to_centres.square().sum(-1) + (along * torch.linalg.solve(inner, along)).sum(1)).clamp(min=_TINY)


class Detector:
    """Tells new texts from known ones, for the skills of one library.

    Attributes:
        skills: name → skill, at least one.
        background: views of texts of no skill.
    """

    def __init__(self, skills: Mapping[str, Skill], background: RowViews):
        """Made of the skills' kept rows and those of the background."""
        self.skills = dict(sorted(skills.items()))
        self.background = background
        seen = [_seen(views) for views in (*(skill.views for skill in self.skills.values()), background)]
        lengths = [skill.views.counts.sum(-1).double() for skill in self.skills.values()]
        self._shortest = [float(each.quantile(HARDLY_ANY)) for each in lengths]
        self._within, self._total = [], []
        for view in range(len(_VIEWS)):
            there = [rows.means[rows.counts[:, view] > 0, view] for rows in seen]
            classes = _classes(there)
            together = torch.cat(there)
            self._within.append(_Cloud.of(together, classes, len(there)))
            self._total.append(_Cloud.of(together, torch.zeros_like(classes), 1))
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._warned: set[float] = set()  # the rates that cannot be had

    def is_of(self, skills: Mapping[str, Skill], background: RowViews) -> bool:
        """Whether it was made of these very objects, which never change."""
        same = self.skills.keys() == skills.keys() and all(self.skills[name] is skills[name] for name in skills)
        return same and self.background is background

    def of_rows(self, views: RowViews, false_alarm: float = FALSE_ALARM) -> list[Novelty]:
        """What is said of each row."""
        return self._judge(_seen(views), views.counts.sum(-1).tolist(), 1, false_alarm)

    def of_batch(self, views: RowViews, false_alarm: float = FALSE_ALARM) -> Novelty:
        """What is said of all rows together, by the mean of their views.

        It is compared with groups of rows of each skill: every row with those nearest to it, because rows that come
        together are alike, more than rows drawn at random. They overlap: the rate of false alarms is no promise here.
        """
        rows = _seen(views)
        together = _Seen(_mean(rows)[None], rows.counts.sum(0, keepdim=True))
        length = float(views.counts.sum(-1).double().mean())
        return self._judge(together, [length], len(rows.means), false_alarm)[0]

    def nearest(self, views: RowViews) -> list[list[tuple[str, float]]]:
        """For each row all skills with their scores, the nearest first."""
        seen = _seen(views)
        usable = (seen.counts > 0)[..., None] & self._has
        scores = _means(self._ratios(seen), usable)
        names = list(self.skills)
        return [[(names[skill], float(row[skill])) for skill in row.argsort(stable=True).tolist()] for row in scores]

    def known_scores(self, size: int = 1, there: Tensor | None = None) -> Tensor:
        """Float64 `[G]`: the scores of known rows, or groups of `size` of them, that had no part in what they met.

        Args:
            size: rows of a group, rounded down to a power of two; at most half of a skill's.
            there: bool `[V]`, the views by which they are scored; default all.
        """
        size = 1 << (size.bit_length() - 1)  # few sizes, each of which is kept
        if size not in self._known:
            self._known[size] = self._left_out(size)
        ratios, usable = self._known[size]
        scores, _ = _least(ratios, usable if there is None else usable & there[:, None])
        return scores[scores.isfinite()]

    def _judge(self, seen: _Seen, lengths: list[float], size: int, false_alarm: float) -> list[Novelty]:
        if not 0 < false_alarm < 1:
            raise ValueError(f"false_alarm={false_alarm}: expected a share between 0 and 1, for example 0.01.")
        ratios = self._ratios(seen)
        there = seen.counts > 0
        scores, nearest = _least(ratios, there[..., None] & self._has)
        p = torch.zeros_like(scores)
        for kind in there.unique(dim=0):
            known, same = self.known_scores(size, kind).sort().values, (there == kind).all(-1)
            as_high = len(known) - torch.searchsorted(known, scores[same])
            p[same] = (1 + as_high.double()) / (1 + len(known))
            if 1 / (1 + len(known)) > false_alarm and false_alarm not in self._warned:
                self._warned.add(false_alarm)
                logger.warning(
                    "by %d scores of known texts the rate of false alarms is at least %.2g, and %.2g was asked: "
                    "nothing will be called new. Teach more rows, or ask for a higher rate.",
                    *(len(known), 1 / (1 + len(known)), false_alarm),
                )
        names, found = list(self.skills), []
        for skill, length, one_p, score in zip(nearest.tolist(), lengths, p.tolist(), scores.tolist(), strict=True):
            if one_p > RELATED_WITHIN * false_alarm:
                answer = KNOWN
            elif length < min(SHORT, self._shortest[skill]):
                answer = TOO_SHORT
            else:
                answer = RELATED if one_p > false_alarm else NEW
            found.append(Novelty(answer, names[skill], one_p, score))
        return found

    @property
    def _has(self) -> Tensor:
        """Bool `[V, E]`: which skill has rows with which view."""
        return torch.stack([cloud.counts[:-1] > 0 for cloud in self._within])

    def _ratios(self, seen: _Seen) -> Tensor:
        """Float64 `[·, V, E]`; anything where a view is missing."""
        found = []
        for view, (within, total) in enumerate(zip(self._within, self._total, strict=True)):
            means = seen.means[:, view]
            spread = 1 / seen.counts[:, view, None].clamp(min=1) + 1 / within.counts[:-1].clamp(min=1).double()
            found.append((within.distances(means)[:, :-1] / spread).log() - total.distances(means).log())
        return torch.stack(found, dim=1)

    def _left_out(self, size: int) -> tuple[Tensor, Tensor]:
        """Float64 `[G, V, E]` ratios of all groups, and bool which of them can be used."""
        ratios, usable = [], []
        for own, skill in enumerate(self.skills.values()):
            rows = _seen(skill.views)
            members = _groups(rows.means[:, _VIEWS.index("prompt")], size)
            found = rows.means.new_zeros(len(members), len(_VIEWS), len(self.skills))
            can = torch.zeros(len(members), len(_VIEWS), dtype=torch.bool)
            for view, (within, total) in enumerate(zip(self._within, self._total, strict=True)):
                there = rows.counts[members, view] > 0
                for number in there.sum(-1).unique().tolist():
                    which, left = there.sum(-1) == number, int(within.counts[own]) - number
                    if not number or left < 1:
                        continue
                    groups, means = members[which][there[which]].unflatten(0, (-1, number)), rows.means[:, view]
                    counts = within.counts[:-1].clone()
                    counts[own] = left
                    spread = 1 / number + 1 / counts.clamp(min=1).double()
                    distances = within.distances_without(means, groups, own)[:, :-1]
                    found[which, view] = (distances / spread).log() - total.distances_without(means, groups, 0).log()
                    can[which, view] = True
            ratios.append(found)
            usable.append(can[..., None] & self._has)
        return torch.cat(ratios), torch.cat(usable)


def _classes(rows: list[Tensor]) -> Tensor:
    """Int64 `[N]`, the number of the tensor that each row is of."""
    return torch.arange(len(rows)).repeat_interleave(torch.tensor([len(each) for each in rows]))


def _groups(rows: Tensor, size: int) -> Tensor:
    """Int64 `[R, g]`: each of `rows [R, D]` with those nearest to it, `size` together, or half of all."""
    size = max(min(size, len(rows) // 2), 1)
    return torch.cdist(rows, rows).fill_diagonal_(-1).topk(size, largest=False).indices


def _least(ratios: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of those `[·, V, E]` that can be used: `[·]`, and of which skill they are; ∞ without any."""
    return _means(ratios, usable).min(-1)


def _means(ratios: Tensor, usable: Tensor) -> Tensor:
    """Over the views that can be used: `[·, E]`, ∞ without any."""
    number = usable.sum(1)
    means = torch.where(usable, ratios, 0).sum(1) / number.clamp(min=1)
    return means.masked_fill(number == 0, math.inf)


def _mean(rows: _Seen) -> Tensor:
    """`[V, D]` of rows, each view's of those that have it."""
    there = rows.counts > 0
    return (rows.means * there[..., None]).sum(0) / there.sum(0).clamp(min=1)[:, None]


def _seen(views: RowViews) -> _Seen:
    """The views of rows by which they are told apart; the text as a whole is the prompt of one that has none."""
    prompts, completions = (views.counts > 0).T
    parts = {**dict(zip(VIEWS, views.states.double().unbind(1), strict=True)), "prompt": views.deciding}
    means = torch.stack([parts[name] for name in _VIEWS], dim=1)
    always = torch.ones_like(prompts)
    return _Seen(means, torch.stack([always, always, prompts & completions], dim=1).double())
