"""The passes of an engine through the base, and what is kept from one to the next.

Shapes: B batch, S tokens of a pass, V vocabulary, E experts, n router outputs.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from dylora_moe.arguments import BASE
from dylora_moe.layers.in_force import Generation
from dylora_moe.model import DyLoraMoE
from dylora_moe.passes.cache import keeps_no_cache
from dylora_moe.routing.call import Call

from .slots import SUPPORTED, check_served

logger = logging.getLogger(__name__)


class Passes:
    """Runs passes of a mixture over caches of an engine.

    Args:
        model: the mixture.

    Attributes:
        base: its base.
        config: of the base's decoder.

    Raises:
        ValueError: a base whose requests cannot be served together.
    """

    def __init__(self, model: DyLoraMoE):
        self.model = model
        self.base: Any = model.get_base_model()
        self.config = self.base.config.get_text_config(decoder=True)
        kind = type(self.base).__name__
        if keeps_no_cache(self.base, model.placement):
            raise ValueError(f"{kind} keeps its state in no transformers Cache; {SUPPORTED}")
        check_served(self.new_cache(), kind)
        self._takes = set(inspect.signature(type(self.base).forward).parameters)
        self._generations: dict[frozenset[str] | None, Generation] = {}

    def new_cache(self) -> Cache:
        """An empty cache for one request."""
        return DynamicCache(config=self.config)

    def run(self, call: Call, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """A pass of `call` over `ids [B, S]`, which go on from `cache`.

        Args:
            call: how it is routed.
            ids, positions: `[B, S]`.
            mask: `[B, tokens in the cache + S]`, 1 for tokens.
            cache: what was read before; the tokens are added.

        Returns:
            the last logits `[B, V]`, and the routing weights `[B, E]` they came by.
        """
        inputs = self._inputs(ids, positions) | {
            "attention_mask": mask,
            str(self.model.placement.cache_argument): cache,
            "use_cache": True,
        }
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        with self.model.hooks.calling(call, self._generation(call)):
            logits = self.base(**inputs).logits[:, -1]
        assert call.decision is not None
        return logits, call.decision.all_weights[:, -1]

    def prompt_scores(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The scores `[B, 1, n]` that whole prompts decide by, before they are read in pieces."""
        return self.model.hooks.prompt_scores(self._inputs(ids, positions))

    def forget(self) -> None:
        """Drop what was made of the experts, which have changed."""
        self._generations.clear()

    def agree_in_pieces(self, length: int) -> bool:
        """Whether the bare base reads `length` tokens in pieces as it does at once; says so if not."""
        ids = torch.arange(length, device=self.model.device)[None] * 7 % self.config.vocab_size
        with torch.no_grad(), self.model.holder.lock.turn():
            whole, pieces = (self._base_logits(ids, size) for size in (length, max(length // 3, 1)))
        difference = float((whole - pieces).abs().max() / whole.abs().max())
        agree = difference <= max(1e-4, 4 * torch.finfo(whole.dtype).eps)
        if not agree:
            logger.warning(
                "%s answers otherwise where a prompt is read in pieces (logits differ by %.1e of the largest): prompts "
                "are read at once, and a long one holds up the other requests.",
                type(self.base).__name__,
                difference,
            )
        return agree

    def _base_logits(self, ids: Tensor, size: int) -> Tensor:
        """The bare base's last logits `[1, V]`, `ids [1, S]` read in pieces of `size`."""
        cache, logits = self.new_cache(), ids
        for start in range(0, ids.shape[1], size):
            own = ids[:, start : start + size]
            end = start + own.shape[1]
            positions = torch.arange(start, end, device=ids.device)[None]
            logits, _ = self.run(Call(experts=BASE), own, positions, torch.ones_like(ids[:, :end]), cache)
        return logits

    def _inputs(self, ids: Tensor, positions: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids}
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions
        return inputs

    def _generation(self, call: Call) -> Generation | None:
        """What passes like this one keep; where all rows are forced, layers pack the experts that are among them."""
        experts = {call.experts} if call.experts is None or isinstance(call.experts, str) else {*call.experts}
        if len(experts) == 1 and None not in experts:
            return None  # PEFT's own forward
        key = None if None in experts else frozenset(map(str, experts))
        if key not in self._generations:  # of forced batches the last one's only, for there are many
            self._generations = {old: kept for old, kept in self._generations.items() if old is None}
            self._generations[key] = Generation()
        return self._generations[key]
