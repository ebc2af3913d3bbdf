"""What stock callers expect of a PeftModel, and what a mixture answers.

Trainer and TRL know PEFT models that have one adapter, called `"default"`. To them a mixture as a whole is that one: it
is active, it is loaded again from a checkpoint, and with it off the base is left.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from torch import Tensor

WHOLE = "default"
"""The name under which a mixture is one adapter; no expert may have it."""
OWN_TAG = "dylora-moe"
"""The tag of our own trainer."""
REFERENCE = "ref"
"""What TRL calls the copy of the adapter that it compares with."""

logger = logging.getLogger(__name__)

_TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")
_NOT_TRAINED = {
    "reward-trainer": (
        "RewardTrainer trains a sequence classifier with a score of its own, and a mixture is a causal language model, "
        "whose logits are no score: train the reward model as a stock PeftModel."
    ),
    "orpo": "",
    "cpo": "",
}
"""TRL's trainers that cannot train a mixture, by the tag that they give to a model, and why; `""` where it depends."""


class AdapterConfigs(dict[str, PeftConfig]):
    """The experts' configurations by name; asked for the whole mixture's, that of the mixture, which is not listed."""

    def __init__(self, experts: Mapping[str, PeftConfig], whole: PeftConfig):
        super().__init__(experts)
        self.whole = whole

    def __missing__(self, name: str) -> PeftConfig:
        if name == WHOLE:
            return self.whole
        raise KeyError(name)


class WholeLoraModel(LoraModel):
    """PEFT's model inside a mixture, all of whose adapters stay active: one left out would stop training unasked."""

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, which calls it itself whenever the set of adapters changes.

        Raises:
            ValueError: an expert would be left out.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        left_out = [name for name in self.active_adapters if name in self.peft_config and name not in names]
        if left_out:
            raise ValueError(
                f"base_model.set_adapter({adapter_name!r}) would freeze {', '.join(left_out)}, and choose no expert: a "
                "mixture keeps all active. Force one with experts=..., freeze with freeze_expert."
            )
        super().set_adapter(adapter_name, inference_mode)


def ignored_at_inference(config: Any, own: Sequence[str]) -> list[str]:
    """The fields of an output that Trainer keeps from predictions: the base's, its cache and our `own`."""
    known = list(getattr(config, "keys_to_ignore_at_inference", None) or [])
    return list(dict.fromkeys([*known, "past_key_values", *own]))


def share_of_step(labels: Tensor, num_items: Tensor | int) -> Tensor:
    """How much of an optimizer step a micro-batch is, scalar: its shifted labels over those of the whole step.

    Args:
        labels: `[B, S]`, -100 where the loss does not look.
        num_items: what Trainer calls `num_items_in_batch`.
    """
    return (labels[..., 1:] != -100).sum() / num_items


def is_trainer_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name that Trainer gives to its checkpoints."""
    return _TRAINER_CHECKPOINT.fullmatch(folder.name) is not None


def check_trainer(tags: str | Sequence[str], base_config: Any, per_sequence: bool, router_loss: bool) -> None:
    """Refuse those of TRL's trainers that cannot train a mixture; each gives its model a tag when it is made.

    Those that leave the router's losses out are warned of.

    Args:
        tags: given to the model.
        base_config: of the base.
        per_sequence: whether the routing is decided on the prompt.
        router_loss: whether the mixture has a balance or z loss.

    Raises:
        ValueError: with the reason.
    """
    tags = [tags] if isinstance(tags, str) else tags
    for tag in tags:
        if tag not in _NOT_TRAINED:
            continue
        reason = _NOT_TRAINED[tag]
        if not reason and getattr(base_config.get_text_config(), "output_router_logits", False):
            reason = (
                f"TRL's {tag.upper()}Trainer takes `aux_loss` for the auxiliary loss of the base's own experts; set "
                "output_router_logits=False in the base's configuration to train without that."
            )
        if not reason and per_sequence:
            reason = (
                f"TRL's {tag.upper()}Trainer does not say where the prompt ends, so completions would decide their own "
                'routing; use granularity="token".'
            )
        if reason:
            raise ValueError(reason)
    if "trl" in tags and OWN_TAG not in tags and router_loss:
        logger.warning(
            "TRL's %s trainer computes its own loss, and the mixture's balance and z losses have no part in it; "
            'balance_loss="none" says that this is meant, MoETrainer (supervised fine-tuning) adds them.',
            ", ".join(tag for tag in tags if tag != "trl"),
        )
