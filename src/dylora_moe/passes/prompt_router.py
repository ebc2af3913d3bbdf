"""The router of a mixture without its experts: which of them a whole prompt is for, by the layers below k alone.

Shapes: B batch, S tokens of a prompt, E experts, n router outputs, k router layer, L decoder layers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora_moe.base.placement import Placement
from dylora_moe.checkpoint.mixture import (
    ROUTER_FILE,
    Description,
    empty_router,
    load_base_of,
    read_description,
    read_library,
    read_router,
    read_vocabulary,
)
from dylora_moe.checkpoint.vocabulary import put_rows
from dylora_moe.experts.expert_set import masked_columns
from dylora_moe.routing.decision import Rows, decide, largest
from dylora_moe.routing.granularity import GRANULARITIES
from dylora_moe.routing.router import Router
from dylora_moe.skills.reading import SEPARATOR

from .cache import keeps_no_cache
from .first_pass import prompt_scores

logger = logging.getLogger(__name__)


class PromptRouter(nn.Module):
    """Chooses an expert per prompt as the mixture itself does at sequence granularity, whatever its own one is.

    It holds the frozen base below layer k and the router: no expert, no layer from k on, no language-model head.

    Args:
        base: the bare causal language model. Its layers from k on and its head lose their weights.
        description: of the mixture.
        router: its router.
        separator: what stands between prompt and completion where no chat template is used.

    Attributes:
        expert_names: the experts, in the order of the columns of the weights.
        description, base, router, separator: as given.

    Raises:
        ValueError: a base that cannot be run up to a layer by itself, or a mixture in which no expert is routed yet.
    """

    def __init__(self, base: PreTrainedModel, description: Description, router: Router, separator: str = SEPARATOR):
        super().__init__()
        self.description, self.separator = description, separator
        self.expert_names = list(description.states)
        self._placement = Placement.of(base)
        self._layer = description.config.resolve_router_layer(self._placement.num_layers)
        if keeps_no_cache(base, self._placement):
            raise ValueError(
                f"{type(base).__name__} keeps its state in no transformers Cache, so that it cannot run up to the "
                "router's layer by itself; the mixture as a whole routes it."
            )
        masked = masked_columns(description.states.values())
        if len(masked) == router.num_outputs:
            raise ValueError(
                "no expert of the mixture is routed yet, so there is nothing to choose by; `dylora-moe teach` tells "
                "the router what they are for."
            )
        self._policy = description.config.policy_for(training=False, masked=masked)
        self.base: Any = base
        self.router = router
        _drop(self._placement.layers(base)[self._layer :])
        if (head := base.get_output_embeddings()) is not None:
            _drop(head)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, base: PreTrainedModel | str | None = None, **base_kwargs: Any
    ) -> PromptRouter:
        """Read the router of a mixture that `save_pretrained` wrote; the experts' tensors are not looked at.

        The base is loaded as a whole before its upper layers are dropped.

        Args:
            directory: folder or hub id of a checkpoint.
            base: overrides the base named in the checkpoint.
            base_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            CheckpointError: a missing, truncated, mis-shaped, pickled or unknown file, or a newer format.
            ValueError: see the class.
        """
        folder, known = read_description(directory)
        model, _ = load_base_of(folder, known, base, base_kwargs)
        router = empty_router(folder, known, model)
        router.load_state_dict(read_router(folder / ROUTER_FILE, router), assign=True)
        put_rows(model, read_vocabulary(folder, known, model))
        skills = read_library(folder, known, model.config.get_text_config().hidden_size)
        if skills.is_of_another(model):
            logger.warning("%s: its skills were taught with a base of other weights; this one routes wrongly.", folder)
        return cls(model, known, router, skills.separator)

    @property
    def device(self) -> torch.device:
        """Where prompts are read."""
        return next(self.base.get_input_embeddings().parameters()).device

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the base knows."""
        return self.base.config.get_text_config().vocab_size

    @property
    def positions(self) -> int | None:
        """How many tokens a prompt may have; None where the base sets no limit."""
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """The weights `[B, E]` that prompts of one length decide on; what they leave of 1 is the base's share.

        One thread at a time: the decoder's layers are exchanged meanwhile.

        Args:
            input_ids: `[B, S]`, without padding.
        """
        where = (self.base, self._placement, self._layer)
        scores = prompt_scores(*where, self.router, GRANULARITIES["sequence"], {"input_ids": input_ids})
        rows = Rows(input_ids.shape[0], 1)
        return decide(scores, rows, self._policy, len(self.expert_names)).weights[:, 0]

    def choose(self, ids: Sequence[int]) -> str:
        """The expert with the largest weight for a prompt, or `"base"` where the base's share is larger.

        Args:
            ids: S of the prompt.
        """
        weights = self(torch.tensor([list(ids)], device=self.device))
        return largest(weights[0].tolist(), self.expert_names)


def _drop(module: nn.Module) -> None:
    """Take a module's tensors away; whoever runs the layers below may still look at its other attributes."""
    for part in module.modules():
        for name in [name for name, _ in part.named_parameters(recurse=False)]:
            delattr(part, name)
        for name in [name for name, _ in part.named_buffers(recurse=False)]:
            delattr(part, name)
