"""Several experts as one of a given rank: the singular value decomposition of their weighted sum, cut off.

With Δ = Σ_e w_e s_e B_e A_e = B A, where A and B are the concatenated factors, B = Q_B R_B and Aᵀ = Q_A R_A, the
singular values of Δ are those of the small R_B R_Aᵀ = U Σ Vᵀ, and the best Δ_R of rank R is Q_B U_R Σ_R V_Rᵀ Q_Aᵀ
(Eckart, Young 1936). No [O, D] matrix is made.

Shapes: D in, O out, P sum of the experts' ranks, R rank that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from .expert_set import ExpertSet
from .export import A_PARTS, adapter_config, concatenated


class Truncation(NamedTuple):
    """What a merged expert lacks of the sum that it stands for.

    Attributes:
        error: ‖Δ − Δ_R‖ / ‖Δ‖, Frobenius norms over all layers together; 0 where nothing is cut off.
        by_layer: the same of each layer, by its path.
    """

    error: float
    by_layer: dict[str, float]

    @property
    def worst(self) -> str:
        """The path of the layer that lost most."""
        return max(self.by_layer, key=lambda path: self.by_layer[path])


def merged(
    experts: ExpertSet,
    configs: Mapping[str, LoraConfig],
    weights: Mapping[str, float],
    rank: int,
    base_name: str | None,
) -> tuple[LoraConfig, dict[str, Tensor], Truncation]:
    """Σ_e w_e · expert_e as one LoRA of at most rank R in every layer, exact where the ranks sum to no more.

    Args:
        experts: of the mixture.
        configs: the stock configuration of every expert.
        weights: expert name → weight, any finite value.
        rank: R.
        base_name: what the adapter says it was made for.

    Returns:
        its configuration, its tensors by stock key in float64, and how much was cut off.

    Raises:
        ValueError: as `fixed_mixture`, or a rank that is no positive integer.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}: a positive integer is needed.")
    tensors, lost, whole = concatenated(experts, configs, weights, torch.float64), {}, {}
    for key in list(tensors):
        part = next((part for part in A_PARTS if key.endswith(f".{part}")), None)
        if part is None:
            continue
        prefix = key.removesuffix(part)
        path, other = prefix.removeprefix("base_model.model.").removesuffix("."), prefix + A_PARTS[part]
        A, B, values = truncated(tensors[key], tensors[other], rank)
        lost[path], whole[path] = float(values[rank:].square().sum()), float(values.square().sum())
        if tensors[key].shape[0] > rank:
            tensors[key], tensors[other] = A, B
    by_layer = {path: _relative(lost[path], whole[path]) for path in lost}
    truncation = Truncation(_relative(sum(lost.values()), sum(whole.values())), by_layer)
    config = adapter_config(experts, tensors, base_name)
    config.inference_mode = False  # whether it trains is the mixture's business
    return config, tensors, truncation


def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best factors of rank R for B A, of equal size, and all its singular values in falling order.

    Args:
        A: `[P, D]`.
        B: `[O, P]`.
        rank: R.

    Returns:
        `[R, D]`, `[O, R]` and at least as many singular values as B A has; R is less where they are fewer.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, values, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    roots = values[:rank].sqrt()
    return (roots[:, None] * V[:rank]) @ Q_A.T, Q_B @ (U[:, :rank] * roots), values


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
