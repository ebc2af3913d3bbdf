"""What a mixture's forward returns."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class MoECausalLMOutput(CausalLMOutputWithPast):
    """Output of `DyLoraMoE.forward`: that of a causal language model, and the routing.

    Attributes:
        loss: `lm_loss + aux_loss`, scalar, if labels were given.
        lm_loss: the base's own loss, scalar.
        aux_loss: balance and z losses with their coefficients applied, scalar; None if no row was routed.
        balance_loss: the balance loss without its coefficient, scalar.
        routing_weights: float32 `[B, S, E]`, what the layers multiplied by; None with adapters disabled.
        router_logits: float32 `[B, S, n]` before any policy (−inf for experts that are not routed yet), n = E plus
            one with a base route; None if no row was routed.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    routing_weights: Tensor | None = None
    router_logits: Tensor | None = None


_DECLARED = frozenset(field.name for field in dataclasses.fields(MoECausalLMOutput))


def with_routing_fields(output: ModelOutput, **routing: Tensor | None) -> MoECausalLMOutput:
    """`output` of any base as a `MoECausalLMOutput` that declares every field it carries."""
    fields = {name: value for name, value in output.items() if value is not None}
    further = tuple(name for name in fields if name not in _DECLARED)
    output_class = _output_class(further) if further else MoECausalLMOutput
    return output_class(**{**fields, **routing})


@functools.cache
def _output_class(further: tuple[str, ...]) -> type[MoECausalLMOutput]:
    """DDP rebuilds outputs from their declared fields, so a base's further ones (TRL's fused head) are declared."""
    fields = [(name, "Tensor | None", dataclasses.field(default=None)) for name in further]
    return dataclasses.make_dataclass("MoECausalLMOutput", fields, bases=(MoECausalLMOutput,))
