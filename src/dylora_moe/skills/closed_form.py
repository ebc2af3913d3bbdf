"""The router in closed form: linear discriminant analysis of the skills' sums, every skill weighing the same.

A skill e with mean μ_e scores a state x by the log-density, but for what all skills share, of a normal distribution
around μ_e with the pooled covariance S, the mean of the skills' own covariances, shrunk (Friedman 1989, eq. 18):

    S = Σ_e S_e / E + SHRINKAGE · tr(·)/D · I        score_e(x) = (x − m)ᵀ S⁻¹ (μ_e − m) − ½ (μ_e − m)ᵀ S⁻¹ (μ_e − m)

where m, the mean of the means, changes no difference of scores. Tokens of one text are not independent, so the scores
are too sure of themselves; a temperature for single tokens and one for means over a text is what makes rows most likely
that had no part in the fit.

Shapes: E skills, R rows of one skill, r rank of what is taken back of a row, D width of a state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .skill import Skill
from .sums import unpack

SHRINKAGE = 0.02
"""Share of the mean variance that is added to every direction; 0.01 to 0.03 route alike."""
TAKEN_BACK = 0.98
"""Share of a row's part in the scatter that is taken back: views are rounded, and more than is there must not be."""


class Pool(NamedTuple):
    """Scatters that were put together and cannot be taken apart.

    Attributes:
        scatter: float64 `[D(D+1)/2]`, the sum of the skills' own covariances.
        skills: how many skills' it is.
    """

    scatter: Tensor
    skills: int


class Fit(NamedTuple):
    """A router for some skills, in the order of their names.

    Attributes:
        names: of the skills, sorted.
        weight: float64 `[E, D]`.
        bias: float64 `[E]`.
        temperatures: by calibration: of scores of single tokens, and of means over a text.
    """

    names: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    temperatures: dict[str, float]

    def rows_for(self, experts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Weight `[·, D]` and bias `[·]` in the order of `experts`; zeros for one without a skill."""
        weight, bias = self.weight.new_zeros(len(experts), self.weight.shape[1]), self.bias.new_zeros(len(experts))
        for row, name in enumerate(experts):
            if name in self.names:
                column = self.names.index(name)
                weight[row], bias[row] = self.weight[column], self.bias[column]
        return weight, bias


class _Discriminant(NamedTuple):
    """`centred [E, D]` means and their `middle [D]`; the `precision [D, D]` S⁻¹; `share`: 1/E of a skill in S."""

    centred: Tensor
    middle: Tensor
    precision: Tensor
    share: float


def fit(skills: Mapping[str, Skill], pool: Pool | None = None, shrinkage: float = SHRINKAGE) -> Fit:
    """The router of `skills`, which depends on no order.

    Args:
        skills: at least one, of which those without a scatter of their own are in the `pool`.
        pool: scatters that were put together.
        shrinkage: share of the mean variance that is added to every direction.
    """
    names = tuple(sorted(skills))
    found = _discriminant([skills[name] for name in names], pool, shrinkage)
    weight = found.centred @ found.precision
    bias = -0.5 * ((found.centred + 2 * found.middle) * weight).sum(-1)
    sequence, token = _left_out([skills[name] for name in names], found)
    return Fit(names, weight, bias, {"token": _temperature(token), "sequence": _temperature(sequence)})


def left_out(
    skills: Mapping[str, Skill], pool: Pool | None = None, shrinkage: float = SHRINKAGE
) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """How each kept row would be scored as a sequence by a router that had never seen it.

    A skill's only row cannot be left out; it is scored by a router that had seen it.

    Returns:
        skill → float64 scores `[R, E]`, and the names of the columns.
    """
    names = tuple(sorted(skills))
    ordered = [skills[name] for name in names]
    scores, _ = _left_out(ordered, _discriminant(ordered, pool, shrinkage))
    return {name: (rows, names) for name, rows in zip(names, scores, strict=True)}


def _discriminant(skills: list[Skill], pool: Pool | None, shrinkage: float) -> _Discriminant:
    means = torch.stack([skill.sums.mean for skill in skills])
    width = means.shape[-1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for skill in skills:
        if not skill.compact:
            total += skill.sums.covariance()
    count = sum(not skill.compact for skill in skills)
    if pool is not None:
        total += unpack(pool.scatter, width)
        count += pool.skills
    within = total / count
    within.diagonal().add_(shrinkage * (float(within.trace()) / width or 1.0))  # a text of one token does not vary
    middle = means.mean(0)
    return _Discriminant(means - middle, middle, torch.cholesky_inverse(torch.linalg.cholesky(within)), 1 / count)


def _left_out(skills: list[Skill], found: _Discriminant) -> tuple[list[Tensor], list[Tensor]]:
    """Per skill float64 `[R, E]` scores of each kept row, its own part in mean and S taken back.

    With p and c = 1 − p the weights of prompt and completion, n that of the skill, x̄ the mean of the row and x_t its
    single token, of weight v, in the part with mean x̄_t, what is taken back from the skill's scatter is

        Δ = p c (x̄_p − x̄_c)(x̄_p − x̄_c)ᵀ + n / (n − 1) (x̄ − μ)(x̄ − μ)ᵀ + v (x_t − x̄_t)(x_t − x̄_t)ᵀ

    all of the row's part but for how its other tokens vary within prompt and completion. With U Uᵀ = Δ / (E n), S⁻¹ = P
    becomes (S − U Uᵀ)⁻¹ = P + P U (I − Uᵀ P U)⁻¹ Uᵀ P (Sherman, Morrison, Woodbury).

    Returns:
        the scores of what decides as a sequence, and those of the single tokens.
    """
    P, V = found.precision, found.centred
    sequences, tokens = [], []
    for column, skill in enumerate(skills):
        views, n, rest = skill.views, skill.sums.weight, max(skill.rows - 1, 0)
        states, shares, part = views.states.double(), views.shares, views.token_parts[:, None]
        from_mean = (shares[..., None] * states[:, :2]).sum(1) - skill.sums.mean
        v = (shares / views.counts.clamp(min=1)).gather(1, part)
        of_part = states[:, :2].gather(1, part[..., None].expand(-1, -1, states.shape[-1]))[:, 0]
        U = torch.stack(
            [
                shares.prod(-1, keepdim=True).sqrt() * (states[:, 0] - states[:, 1]),
                (n / max(rest, 1)) ** 0.5 * from_mean,
                v.sqrt() * (states[:, 2] - of_part),
            ],
            dim=1,
        )
        U = U * (TAKEN_BACK * found.share / n) ** 0.5 * (rest > 0)
        PU = U @ P
        inverse = torch.linalg.inv(torch.eye(U.shape[1], dtype=U.dtype) - PU @ U.mT)
        own = (V[column] - from_mean / max(rest, 1) * (rest > 0))[:, None]  # μ without the row

        for x, result in ((views.deciding, sequences), (states[:, 2], tokens)):
            scores = _scores(x - found.middle, V, P, PU, inverse)
            scores[:, column] = _scores(x - found.middle, own, P, PU, inverse)[:, 0]
            result.append(scores)
    return sequences, tokens


def _scores(x: Tensor, means: Tensor, P: Tensor, PU: Tensor, inverse: Tensor) -> Tensor:
    """`[R, ·]` scores of centred `x [R, D]` for centred means `[·, D]`, or `[R, 1, D]` of each row's own.

    By the precision P + PU · inverse · PUᵀ of each row, with `PU [R, r, D]` and `inverse [R, r, r]`.
    """
    along = PU @ means.mT
    corrected = inverse @ along
    product = ((x @ P)[:, None] @ means.mT)[:, 0] + ((PU @ x[..., None]) * corrected).sum(1)
    return product - (((means @ P) * means).sum(-1) + (along * corrected).sum(1)) / 2


def _temperature(scores: list[Tensor]) -> float:
    """What the scores of rows are divided by so that their own skills are most likely, every skill weighing the same.

    The target of R rows is (R + ½) / (R + 1) rather than 1, so that few rows without a mistake do not ask for a
    temperature of 0 (as in Platt 1999, section 2.2, with the estimate of Krichevsky and Trofimov 1981).

    Args:
        scores: per skill `[R, E]`, in the order of the columns.
    """
    if len(scores) == 1:
        return 1.0
    rows, sizes = torch.cat(scores), torch.tensor([len(one) for one in scores])
    column = torch.arange(len(scores)).repeat_interleave(sizes)[:, None]
    own = (len(rows) + 0.5) / (len(rows) + 1)
    target = torch.full_like(rows, (1 - own) / (len(scores) - 1)).scatter(1, column, own)
    weighted = rows / sizes[column]
    low, high = -7.0, 7.0  # of log β for β = 1 / temperature; the likelihood's slope falls with β
    for _ in range(50):
        middle = (low + high) / 2
        slope = (weighted * (target - (rows * math.exp(middle)).softmax(-1))).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp(-(low + high) / 2)
