"""The router in closed form: linear discriminant analysis of the skills' sums, every skill weighing the same.

A skill e with mean μ_e scores a state x by the log-density, but for what all skills share, of a normal distribution
around μ_e with the pooled covariance S:

    score_e(x) = (x − m)ᵀ S⁻¹ (μ_e − m) − ½ (μ_e − m)ᵀ S⁻¹ (μ_e − m)

where m, the mean of the means, changes no difference of scores. Means and S are those of what is scored:

    single tokens            x̄_e of all tokens, and T = Σ_e T_e / E + SHRINKAGE · tr(·)/D · I    (Friedman 1989, eq. 18)
    means over a sequence    (n d_e + MEAN_ROWS · x̄_e) / (n + MEAN_ROWS), and S = Σ_e C_e / E + COVARIANCE_ROWS / N · T

where d_e is the mean of what decides in the skill's n rows (prompts), C_e their covariance, of the kept ones, and N how
many rows those are, but for one of each skill. A mean over a text varies in other directions than its tokens do: by T
and x̄, 96.0 % of the prompts of fourteen tasks, some of which ask much the same, go to the right one after 200 rows of
each; so 98.5 % (`benchmarks/lifelong/routing.py`). Where rows are few, tokens say more.

Tokens of one text are not independent, so the scores are too sure of themselves; a temperature for single tokens and
one for means over a text is what makes rows most likely that had no part in the fit.

Shapes: E skills, R rows of one skill, r rank of what is taken back of a row, D width of a state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dylora_moe.routing.router import CALIBRATIONS

from .skill import ROWS_KEPT, Skill
from .sums import pack, unpack

SHRINKAGE = 0.02
"""Share of the mean variance that is added to every direction; 0.01 to 0.03 route alike."""
MEAN_ROWS, COVARIANCE_ROWS = 20, 10
"""How many rows the mean and covariance of the tokens count for where means over a sequence are scored; half and twice
as many route up to 0.6 % fewer right."""
TOKEN, SEQUENCE = CALIBRATIONS
TAKEN_BACK = 0.98
"""Share of a row's part in the scatter that is taken back: views are rounded, and more than is there must not be."""


@dataclass(frozen=True)
class Pool:
    """Covariances of several skills that were put together and cannot be taken apart.

    Attributes:
        scatter: float64 `[D(D+1)/2]`, the sum over the skills of the covariance of their tokens.
        rows: the same of their kept rows, by what decides how they are routed.
        skills: how many skills' it is.
    """

    scatter: Tensor
    rows: Tensor
    skills: int

    @classmethod
    def of(cls, skills: Iterable[Skill], width: int) -> Pool:
        """That of some skills of D = `width`; of those that are compact already, nothing."""
        scatter = torch.zeros(width * (width + 1) // 2, dtype=torch.float64)
        rows, count = torch.zeros(width, width, dtype=torch.float64), 0
        for skill in skills:
            if skill.sums.scatter is not None:
                scatter += skill.sums.scatter / skill.sums.weight
                apart = skill.views.deciding - skill.views.deciding.mean(0)
                rows += apart.T @ apart / len(apart)
                count += 1
        return cls(scatter, pack(rows), count)

    def __add__(self, other: Pool) -> Pool:
        """Both together."""
        return Pool(self.scatter + other.scatter, self.rows + other.rows, self.skills + other.skills)


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
    """What scores single tokens, or means over a sequence.

    Attributes:
        scored: which of `CALIBRATIONS`.
        centred: `[E, D]` means, the mean of which is 0.
        middle: `[D]`, the mean of the means.
        precision: `[D, D]`, S⁻¹.
        count: how many skills' covariances S is the mean of.
    """

    scored: str
    centred: Tensor
    middle: Tensor
    precision: Tensor
    count: int


def fit(
    skills: Mapping[str, Skill], pool: Pool | None = None, scored: str = SEQUENCE, shrinkage: float = SHRINKAGE
) -> Fit:
    """The router of `skills`, which depends on no order.

    Args:
        skills: at least one, of which those without a scatter of their own are in the `pool`.
        pool: scatters that were put together.
        scored: of `CALIBRATIONS`, what it is to score: single tokens, or means over a sequence. It has temperatures for
            both.
        shrinkage: share of the mean variance of the tokens that is added to every direction.
    """
    names = tuple(sorted(skills))
    ordered = [skills[name] for name in names]
    found = _discriminant(ordered, pool, scored, shrinkage)
    weight = found.centred @ found.precision
    bias = -0.5 * ((found.centred + 2 * found.middle) * weight).sum(-1)
    sequence, token = _left_out(ordered, found)
    return Fit(names, weight, bias, {TOKEN: _temperature(token), SEQUENCE: _temperature(sequence)})


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
    scores, _ = _left_out(ordered, _discriminant(ordered, pool, SEQUENCE, shrinkage))
    return {name: (rows, names) for name, rows in zip(names, scores, strict=True)}


def _discriminant(skills: list[Skill], pool: Pool | None, scored: str, shrinkage: float) -> _Discriminant:
    means = torch.stack([_mean(scored, skill.rows, skill.sums.mean, skill.deciding_mean) for skill in skills])
    width = means.shape[-1]
    total = Pool.of(skills, width)
    total = total if pool is None else total + pool
    within = unpack(total.scatter, width) / total.skills
    within.diagonal().add_(shrinkage * (float(within.trace()) / width or 1.0))  # a text of one token does not vary
    if scored == SEQUENCE:
        within = unpack(total.rows, width) / total.skills + _share_of_tokens(skills) * within
    middle = means.mean(0)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(within))
    return _Discriminant(scored, means - middle, middle, precision, total.skills)


def _mean(scored: str, rows: int, of_tokens: Tensor, deciding: Tensor) -> Tensor:
    """`[..., D]`, where a skill of so many rows lies; `of_tokens` and `deciding [..., D]` are their means."""
    return of_tokens if scored == TOKEN else (rows * deciding + MEAN_ROWS * of_tokens) / (rows + MEAN_ROWS)


def _share_of_tokens(skills: Iterable[Skill]) -> float:
    """What the tokens' covariance is multiplied by before it is added to that of the rows."""
    return COVARIANCE_ROWS / max(sum(_kept(skill) - 1 for skill in skills), 1)


def _kept(skill: Skill) -> int:
    """Of how many rows the covariance is."""
    return min(skill.rows, ROWS_KEPT) if skill.compact else len(skill.views.keys)


def _left_out(skills: list[Skill], found: _Discriminant) -> tuple[list[Tensor], list[Tensor]]:
    """Per skill float64 `[R, E]` scores of each kept row, its own part in mean and S taken back.

    With U Uᵀ what is taken back of S, S⁻¹ = P becomes (S − U Uᵀ)⁻¹ = P + P U (I − Uᵀ P U)⁻¹ Uᵀ P (Sherman, Morrison,
    Woodbury).

    Returns:
        the scores of what decides as a sequence, and those of the single tokens.
    """
    P, V = found.precision, found.centred
    sequences, tokens = [], []
    share = _share_of_tokens(skills) if found.scored == SEQUENCE else 1.0
    for column, skill in enumerate(skills):
        rest, U = _part_of_rows(skill, found, share)
        PU = U @ P
        inverse = torch.linalg.inv(torch.eye(U.shape[1], dtype=U.dtype) - PU @ U.mT)
        own = (rest - found.middle)[:, None]

        for x, result in ((skill.views.deciding, sequences), (skill.views.states[:, 2], tokens)):
            scores = _scores(x - found.middle, V, P, PU, inverse)
            scores[:, column] = _scores(x - found.middle, own, P, PU, inverse)[:, 0]
            result.append(scores)
    return sequences, tokens


def _part_of_rows(skill: Skill, found: _Discriminant, share: float) -> tuple[Tensor, Tensor]:
    """Where a skill lies without each of its kept rows, `[R, D]`, and `U [R, r, D]`, the row's part U Uᵀ in S.

    With p and c = 1 − p the weights of prompt and completion, n that of the skill, x̄ the mean of the row and x_t its
    single token, of weight v, in the part with mean x̄_t, its part in the scatter of the skill's tokens, of which S has
    the `share`, is

        Δ = p c (x̄_p − x̄_c)(x̄_p − x̄_c)ᵀ + n / (n − 1) (x̄ − μ)(x̄ − μ)ᵀ + v (x_t − x̄_t)(x_t − x̄_t)ᵀ

    but for how its other tokens vary within prompt and completion. With d what decides how it is routed, δ the mean of
    the R kept rows', its part in their scatter is R / (R − 1) (d − δ)(d − δ)ᵀ. An only row has no part.
    """
    views, n, rest = skill.views, skill.sums.weight, max(skill.rows - 1, 1)
    states, shares, part, deciding = views.states.double(), views.shares, views.token_parts[:, None], views.deciding
    from_mean = (shares[..., None] * states[:, :2]).sum(1) - skill.sums.mean
    v = (shares / views.counts.clamp(min=1)).gather(1, part)
    of_part = states[:, :2].gather(1, part[..., None].expand(-1, -1, states.shape[-1]))[:, 0]
    U = torch.stack(
        [
            shares.prod(-1, keepdim=True).sqrt() * (states[:, 0] - states[:, 1]),
            (n / rest) ** 0.5 * from_mean,
            v.sqrt() * (states[:, 2] - of_part),
        ],
        dim=1,
    ) * (share / n) ** 0.5  # fmt: skip
    if found.scored == SEQUENCE:
        apart = deciding - deciding.mean(0)
        U = torch.cat([U, apart[:, None] * max(_kept(skill) - 1, 1) ** -0.5], dim=1)
    several = float(skill.rows > 1)
    of_tokens = skill.sums.mean - several * from_mean / rest
    deciding = skill.deciding_mean - several * (deciding - skill.deciding_mean) / rest
    return _mean(found.scored, rest, of_tokens, deciding), U * (several * TAKEN_BACK / found.count) ** 0.5


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
