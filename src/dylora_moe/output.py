"""What a mixture's forward returns."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class MoECausalLMOutput(CausalLMOutputWithPast):
    """Output of `DyLoraMoE.forward`: that of a causal language model, and the routing.

    A base that is a mixture of experts itself has an auxiliary loss and router scores of its own; they stand apart.

    Attributes:
        loss: `lm_loss`, plus the base's own auxiliary loss with its coefficient if it has one, plus `aux_loss`; scalar,
            if labels were given.
        lm_loss: the language-model loss alone, scalar.
        aux_loss: balance and z losses with their coefficients applied, scalar; None if no row was routed. Called with
            `num_items_in_batch`, as Trainer does, this micro-batch's share of them. From TRL's fused head over such a
            base it is the base's own, which TRL weighs itself.
        balance_loss: the balance loss without its coefficient, scalar.
        routing_weights: float32 `[B, S, E]`, what the layers multiplied by; None with adapters disabled.
        router_logits: float32 `[B, S, n]` before any policy (−inf for experts that are not routed yet), n = E plus
            one with a base route; None if no row was routed.
        base_aux_loss: the base's own auxiliary loss without its coefficient, scalar.
        base_router_logits: the scores of the base's own routers, as it gives them.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    routing_weights: Tensor | None = None
    router_logits: Tensor | None = None
    base_aux_loss: Tensor | None = None
    base_router_logits: Any = None


_DECLARED = frozenset(field.name for field in dataclasses.fields(MoECausalLMOutput))
OWN_FIELDS = tuple(sorted(_DECLARED - {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}))
"""What an output has beside that of a causal language model."""
_OF_THE_BASE = {"aux_loss": "base_aux_loss", "router_logits": "base_router_logits"}


def with_routing_fields(output: ModelOutput, **routing: Tensor | None) -> MoECausalLMOutput:
    """`output` of any base as a `MoECausalLMOutput` that declares every field it carries."""
    fields = {_OF_THE_BASE.get(name, name): value for name, value in output.items() if value is not None}
    further = tuple(name for name in fields if name not in _DECLARED)
    output_class = _output_class(further) if further else MoECausalLMOutput
    return output_class(**{**fields, **routing})


def comes_from_trl_head(output: ModelOutput) -> bool:
    """Whether TRL's fused head made `output`: log-probabilities, and a loss that TRL's trainers do not look at."""
    return "log_probs" in output


def split_loss(output: ModelOutput, base: Any) -> tuple[Tensor | None, Tensor | None]:
    """The language-model loss of a base's `output`, and what the base added to it for its own experts."""
    loss, aux = output.get("loss"), output.get("aux_loss")
    if loss is None or aux is None:
        return loss, None
    config = base.config.get_text_config()
    places = [(base, "router_aux_loss_coef"), (base, "aux_loss_coef"), (config, "router_aux_loss_coef")]
    if comes_from_trl_head(output):
        places = places[-1:]
    coefficient = next((getattr(owner, name) for owner, name in places if hasattr(owner, name)), 0.0)
    added = coefficient * aux.to(loss.device)
    return loss - added, added


@functools.cache
def _output_class(further: tuple[str, ...]) -> type[MoECausalLMOutput]:
    """DDP rebuilds outputs from their declared fields, so a base's further ones (TRL's fused head) are declared."""
    fields = [(name, "Tensor | None", dataclasses.field(default=None)) for name in further]
    return dataclasses.make_dataclass("MoECausalLMOutput", fields, bases=(MoECausalLMOutput,))
