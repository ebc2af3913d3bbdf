"""What an export is made of, and the fixed mixtures that it is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel

from dylora_moe.base.placement import Placement
from dylora_moe.checkpoint.vocabulary import Vocabulary
from dylora_moe.config import MoELoraConfig, check_name
from dylora_moe.experts.expert_set import ExpertSet
from dylora_moe.routing.router import Router


@dataclass(frozen=True)
class Source:
    """The parts of a mixture that an export reads.

    Attributes:
        base: with the experts in its layers.
        base_name: what it is called, or None.
        placement: where its decoder layers are.
        experts: the set of them.
        configs: the stock configuration of every expert.
        config: of the mixture.
        router: it.
        router_layer: k; L for `"last"`.
        vocabulary: rows of the base's embeddings.
        checkpoint: the folder that the mixture was loaded from, or None.
    """

    base: PreTrainedModel
    base_name: str | None
    placement: Placement
    experts: ExpertSet
    configs: Mapping[str, LoraConfig]
    config: MoELoraConfig
    router: Router
    router_layer: int
    vocabulary: Vocabulary
    checkpoint: Path | None

    def named_mixtures(self, mixtures: Mapping[str, Mapping[str, float]] | None) -> dict[str, dict[str, float]]:
        """Fixed mixtures by name: expert → weight.

        Raises:
            TypeError: something else than mappings.
            ValueError: a name that an expert or the base has or that no folder can have, no or an unknown expert, or a
                weight that is not finite.
        """
        found: dict[str, dict[str, float]] = {}
        if not isinstance(mixtures or {}, Mapping):
            raise TypeError(f'mixtures={mixtures!r:.60}: map names to weights, as {{"half": {{"sql": 0.5}}}}.')
        for name, weights in (mixtures or {}).items():
            check_name(name, [*self.experts.names, "base", *found], "model")
            found[name] = self.weights(weights)
        return found

    def weights(self, weights: Any) -> dict[str, float]:
        """Expert → weight, checked; see `named_mixtures`."""
        if not isinstance(weights, Mapping):
            raise TypeError(f'{weights!r:.60} is no fixed mixture: map experts to weights, as {{"sql": 0.5}}.')
        if not weights:
            raise ValueError("weights={}: name at least one expert.")
        for name, value in weights.items():
            self.experts.check_known(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"weight of {name!r} is {value!r}; it must be a finite number.")
        return {name: float(value) for name, value in weights.items()}
