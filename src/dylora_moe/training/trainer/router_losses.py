"""The router's losses over a whole optimizer step, and what its routing looked like in it.

They are not linear in the tokens, so that a mean over micro-batches or processes would be another loss. The router's
input is frozen: what it read in every micro-batch is kept and scored once more at the end of the step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dylora_moe.model import DyLoraMoE
from dylora_moe.routing.losses import entropy
from dylora_moe.routing.records import RouterRecord

from .callbacks import StarvedExperts
from .collator import per_token
from .distributed import mean_over_processes


class RouterLosses:
    """Gathers what the router read in a step's micro-batches, and computes its losses of them together.

    Args:
        mixture: whose router it is.
        domain_coefficient: weight of the cross-entropy towards each example's domain.
        starved: is told the load of every step.
    """

    def __init__(self, mixture: DyLoraMoE, domain_coefficient: float, starved: StarvedExperts):
        self.mixture, self.domain_coefficient, self.starved = mixture, domain_coefficient, starved
        self.records: list[RouterRecord] = []
        self.domains: list[Tensor] = []

    def collect(self, domains: Tensor | None) -> None:
        """Note the domains `[B, S]` of the micro-batch that the mixture has just recorded, if it was routed."""
        if len(self.records) > len(self.domains) and domains is not None:
            self.domains.append(domains)

    def of_step(self) -> tuple[Tensor | None, dict[str, float]]:
        """The sum of the losses since the last call, and what to log; None and nothing if no router was trained."""
        records, domains = list(self.records), self.domains
        self.records.clear()  # the mixture goes on writing to this list
        self.domains = []
        if not records or not any(p.requires_grad for p in self.mixture.router.parameters()):
            return None, {}
        logged: dict[str, float] = {}
        scores = torch.cat([record.score(self.mixture.router) for record in records])
        scores = self.mixture.policy.mask(scores)  # as the forward passes did
        loss, balance = self.mixture.auxiliary_losses(scores, mean=mean_over_processes)
        if self.domain_coefficient:
            target = torch.cat([per_token(r, d) for r, d in zip(records, domains, strict=True)])
            self._check_routed(target)
            each = F.cross_entropy(scores, target, reduction="none").unsqueeze(-1)
            domain_loss = mean_over_processes(each, None).squeeze(-1)
            loss = loss + self.domain_coefficient * domain_loss
            logged["router/domain_loss"] = float(domain_loss.detach())
        logged["aux_loss"] = float(loss.detach())
        logged["router/balance"] = float(balance.detach())
        return loss, logged | self._routing(scores.detach())

    def _check_routed(self, target: Tensor) -> None:
        """Raise `ValueError` if an example's expert has a masked logit: nothing can lead the router towards it."""
        for column in self.mixture.policy.masked:
            if bool((target == column).any()):
                name = self.mixture.expert_names[column]
                raise ValueError(
                    f"domain_coefficient leads the router towards each example's expert, but {name!r} is not routed "
                    f"yet; call start_routing({name!r}) before training."
                )

    def _routing(self, scores: Tensor) -> dict[str, float]:
        """Entropy, mean largest weight, loads and starved experts of the scores `[T, n]`."""
        shares = self.mixture.policy.shares(scores).values
        rows = torch.cat([shares, entropy(shares)[:, None], shares.amax(-1, keepdim=True)], -1)
        *means, spread, largest = mean_over_processes(rows, None).tolist()
        load = dict(zip(self.mixture.output_names, means, strict=True))
        return {
            "router/entropy": spread,
            "router/max_probability": largest,
            **{f"router/load/{name}": share for name, share in load.items()},
            "router/dead_experts": float(self.starved.update(load)),
        }
