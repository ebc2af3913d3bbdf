"""The hooks that route every pass through the base, whoever starts it.

`generate`, TRL and pipelines call the inner model, so everything begins in the decoder's pre-hook: a decision that the
caller made, or that the prompt did, is put in force there; else the router reads the input of layer k on the way up
(one pass), or what `first_pass` finds there (experts below k), and decides. Deciding makes one value (`routing`),
applying puts one value in force (`layers`); when the pass is over the bare base is back.

Shapes: B batch, S sequence, D hidden, E experts, n router outputs, k router layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dylora_moe.arguments import packed_rows, repeat_rows
from dylora_moe.base.placement import Placement
from dylora_moe.config import MoELoraConfig
from dylora_moe.experts.expert_set import ExpertSet
from dylora_moe.layers.fold import fold, unfold
from dylora_moe.layers.in_force import Generation, Holder, InForce
from dylora_moe.layers.recompute import checkpointable, keep_routing_in_checkpoints
from dylora_moe.layers.routed import check_not_bypassed
from dylora_moe.routing.call import Call
from dylora_moe.routing.decision import Decision, Rows, decide, one_hot_weights
from dylora_moe.routing.granularity import GRANULARITIES, Deciding, Granularity
from dylora_moe.routing.policies import Policy
from dylora_moe.routing.records import RouterRecord
from dylora_moe.routing.router import Router
from dylora_moe.routing.trace import RoutingTrace
from dylora_moe.sharding import is_sharded

from .cache import keeps_no_cache, tokens_in
from .first_pass import first_pass, prompt_scores
from .running_scores import Continued, continued, positions_scored

BARE = InForce(forced=())
"""The bare base."""
PACKED_ROWS = (
    'packed rows hold several sequences, which cannot share one sequence\'s routing; granularity="token" has no such '
    "limit."
)


@dataclass
class Scope:
    """What a `with` block says of the passes of one mixture.

    Attributes:
        owner: the mixture's hooks.
        forced: what passes are forced to that say nothing themselves, or None.
        trace: what records them, or None.
    """

    owner: PassHooks
    forced: str | None = None
    trace: RoutingTrace | None = None


_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("dylora_moe_scopes", default=())
"""The blocks that this thread or task is in, the innermost last; read where a call begins, never in compiled code."""


def _scopes() -> tuple[Scope, ...]:
    """The blocks around a call that begins here; a compiled graph reads no context variable and knows none."""
    return () if torch.compiler.is_compiling() else _SCOPES.get()


class PassHooks:
    """Decides what every pass of one mixture uses, and puts it in force.

    The hooks are methods of an object, so that a deep copy of a mixture has hooks with the copy's own state.

    Args:
        mixture: whose `training` tells how to route.
        base: the causal language model that it wraps.
        placement: where the decoder layers of `base` are.
        router_layer: k; the number of layers for `"last"`.
        config: the mixture's, which may change between passes.
        router, experts, holder: its parts.

    Attributes:
        call: the `forward` or `generate` that runs, if any.
        needs_first_pass: whether an expert sits below the router's layer, or the router reads the final state.
        adapts_head: whether an expert sits behind the decoder, on the language-model head.
        records: what a trainer keeps of the router's passes, if it does.
    """

    def __init__(
        self,
        mixture: nn.Module,
        base: nn.Module,
        placement: Placement,
        router_layer: int,
        config: MoELoraConfig,
        router: Router,
        experts: ExpertSet,
        holder: Holder,
    ):
        self.mixture, self.base, self.placement, self.router_layer = mixture, base, placement, router_layer
        self.config, self.router, self.experts, self.holder = config, router, experts, holder
        self.call: Call | None = None
        self.needs_first_pass = self.adapts_head = False
        self.records: list[RouterRecord] | None = None
        self._pass: tuple[Call, Rows, Continued] | None = None  # the one that runs
        self._waiting = False  # for the router to read the input of layer k
        self._inside_base = False
        decoder = placement.decoder(base)
        self._checkpointable = checkpointable(decoder)
        self._keeps_no_cache = keeps_no_cache(base, placement)
        self._handles = [
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base, always_call=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]
        if router_layer < placement.num_layers:
            layer = placement.layers(base)[router_layer]
            self._handles.append(layer.register_forward_pre_hook(self._before_router_layer, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    @property
    def policy(self) -> Policy:
        """How scores become weights now; it follows the configuration and `train()`/`eval()`."""
        return self.config.policy_for(self.mixture.training, self.experts.masked)

    @property
    def _granularity(self) -> Granularity:
        return GRANULARITIES[self.config.granularity]

    @contextmanager
    def scope(self, forced: str | None = None, trace: RoutingTrace | None = None) -> Iterator[None]:
        """Say something of all passes that this thread or task begins within the block, or one started from it with its
        context."""
        token = _SCOPES.set((*_SCOPES.get(), Scope(self, forced, trace)))
        try:
            yield
        finally:
            _SCOPES.reset(token)

    def rename(self, old: str, new: str) -> None:
        """Follow an expert's new name in the blocks that this thread or task is in."""
        for scope in _SCOPES.get():
            if scope.owner is self and scope.forced == old:
                scope.forced = new

    @property
    def forced(self) -> str | None:
        """What a pass that begins here is forced to if it says nothing itself."""
        return next((s.forced for s in reversed(_scopes()) if s.owner is self and s.forced is not None), None)

    @property
    def trace(self) -> RoutingTrace | None:
        """What records a pass that begins here."""
        return next((s.trace for s in reversed(_scopes()) if s.owner is self and s.trace is not None), None)

    def new_call(self) -> Call:
        """The call of a pass that nobody announced, for example TRL's of the inner model."""
        return Call(experts=self.forced, trace=self.trace)

    @contextmanager
    def calling(self, call: Call, generation: Generation | None = None) -> Iterator[None]:
        """The passes within the block belong to `call`; afterwards everything is as it was."""
        with self.holder.lock.turn():
            outer, around = self.call, self.holder.generation
            if around is not None:
                unfold(self.holder, around)  # it folds again at its next pass
                around = None if outer is None else around  # an interrupt left it behind
            self.call, self.holder.generation = call, generation
            try:
                if call.fold and self._compiled:
                    self._fold_ahead(call)
                yield
            finally:
                self.call, self._pass = outer, None
                self._rest()
                if generation is not None:
                    unfold(self.holder, generation)
                self.holder.generation = around

    def prompt_scores(self, inputs: dict[str, Any]) -> Tensor:
        """What sequence granularity holds for prompts that are then read in pieces: `[B, 1, n]`, for `Call.held`.

        Args:
            inputs: of the decoder: the whole prompts, without padding.
        """
        with self.calling(Call()):
            where = (self.base, self.placement, self.router_layer)
            return prompt_scores(*where, self.router, self._granularity, inputs, self.mixture.training)

    # ------------------------------------------------------------------ the hooks

    def _before_base(self, base: nn.Module, args: Any, kwargs: dict) -> None:
        if self.adapts_head and isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise ValueError(
                "logits_to_keep as a tensor picks positions that an expert on the language-model head cannot tell; "
                "pass a number (the last so many), or select from the full logits."
            )
        self._inside_base = True

    def _after_base(self, base: nn.Module, args: Any, output: Any) -> None:
        self._inside_base = False
        self._rest()

    def _rest(self) -> None:
        self.holder.rest()
        self.holder.reached = None

    def _before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            kwargs = {**inspect.signature(type(decoder).forward).bind(decoder, *args).arguments, **kwargs}
            kwargs.pop("self", None)
        call = self.new_call() if self.call is None else self.call
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        batch, length = (ids if ids is not None else kwargs["inputs_embeds"]).shape[:2]
        cumulative = self._granularity.cumulative and not call.decided
        seen = positions_scored(kwargs.get(str(self.placement.cache_argument))) if cumulative else None
        rows = call.rows(batch, length, mask, self.experts.names, seen)
        self._pass, self._waiting, call.decision = (call, rows, Continued()), False, None
        self.holder.reached = None if call.trace is None else call.trace.reached
        self.holder.put(BARE)  # whatever runs before the router has read is the bare base
        self._prepare()
        if self.experts.disabled:
            return (), kwargs
        decision, hidden = self._made_before(call, rows, kwargs), None
        if decision is not None:
            self._apply(decision)
            return (), kwargs
        if self.needs_first_pass:
            keep = not self._granularity.per_sequence
            where = (self.base, self.placement, self.router_layer)
            kwargs, hidden = first_pass(*where, kwargs, keep, self.mixture.training)
        if cumulative and not rows.forced:
            where = (self.base, self.placement, self._keeps_no_cache)
            kwargs, earlier = continued(*where, kwargs, length, self.mixture.training)
            self._pass = call, rows, earlier
        if hidden is None:
            self._waiting = True
        else:
            self._apply(self._read(hidden))
        return (), kwargs

    def _before_router_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._waiting:
            self._waiting = False
            self._apply(self._read(self.placement.state_of(args[0] if args else kwargs["hidden_states"])))

    def _after_decoder(self, decoder: nn.Module, args: Any, output: Any) -> None:
        running, self._pass = self._pass, None
        self._waiting = False
        if running is not None and running[0].trace is not None and running[0].decision is not None:
            running[0].trace.record(running[0].decision)
        if not self._inside_base:  # else the language-model head may carry experts, too
            self._rest()

    # ------------------------------------------------------------------ deciding

    def _made_before(self, call: Call, rows: Rows, kwargs: dict) -> Decision | None:
        """The decision that the caller made, or that the prompt did; None if the router has to read."""
        if call.weights is not None:
            return Decision(rows, repeat_rows(call.weights, rows.batch))
        if torch.compiler.is_compiling() and call.one_hot is not None:  # one graph for every forced expert
            weights = repeat_rows(call.one_hot, rows.batch)
            return Decision(rows, weights, weights.argmax(-1, keepdim=True))
        if rows.forced:
            if self.experts.touch_all and torch.is_grad_enabled():
                return None
            return Decision(rows, self._one_hot(rows))
        if call.held is not None:
            return self._decide(repeat_rows(call.held, rows.batch), rows)
        if not self._granularity.per_sequence:
            return None
        if kwargs.get("cache") is not None:
            raise ValueError(PACKED_ROWS)
        packed = packed_rows(call.mask_of(kwargs), kwargs)
        if torch.compiler.is_compiling() and isinstance(packed, Tensor):
            torch._assert_async(~packed, PACKED_ROWS)  # a graph does not wait for a value
        elif packed:
            raise ValueError(PACKED_ROWS)
        if tokens_in(kwargs.get(str(self.placement.cache_argument))):
            raise ValueError(
                "sequence granularity decides on the prompt, which is in the cache already: generate with "
                "model.generate, or pass routing_weights=output.routing_weights[:, -1] of the prompt's pass."
            )
        return None

    def _read(self, hidden: Tensor) -> Decision:
        """Score `hidden [B, S, D]` and decide."""
        assert self._pass is not None
        call, rows, earlier = self._pass
        hidden = hidden.detach()
        first = next(self.router.parameters())
        if not is_sharded(first):  # else FSDP places it; a base over several devices moves the layer's input after us
            hidden = hidden.to(first.device)
        if rows.forced:  # where processes share parameters in shards, all must touch the router and every expert
            scores = self.router(hidden)
            return Decision(rows, self._one_hot(rows).to(scores.device) + scores.sum() * 0)
        if len(self.experts.masked) == self.router.num_outputs:
            how = "model.teach(name, rows)" if self.router.computed else "model.start_routing()"
            raise ValueError(f"no expert is routed yet: call {how}, or force one with experts=...")
        granularity, deciding = self._granularity, Deciding()
        if granularity.per_sequence:
            deciding = Deciding(call.prompt_tokens(rows, hidden.device))
        elif granularity.cumulative:
            deciding = earlier.deciding(rows.mask, self.router.num_outputs)
        scores, totals = self.router.scores(hidden, granularity, deciding)
        if granularity.per_sequence:
            call.held = scores
        if totals is not None and earlier.layer is not None:
            earlier.layer.append(totals)
        if self.records is not None and self.mixture.training:
            mask = rows.routed_mask(hidden.device)
            self.records.append(RouterRecord(hidden, deciding.detached(), mask, granularity))
        return self._decide(scores, rows)

    def _decide(self, scores: Tensor, rows: Rows) -> Decision:
        return decide(scores, rows, self.policy, len(self.experts.names))

    def _one_hot(self, rows: Rows) -> Tensor:
        device = next(self.router.parameters()).device
        return one_hot_weights(rows.columns or (), len(self.experts.names), device)

    # ------------------------------------------------------------------ applying

    def _apply(self, decision: Decision) -> None:
        """Put a decision in force."""
        assert self._pass is not None
        call = self._pass[0]
        call.decision = decision
        self.holder.put(self._in_force(decision))
        generation = self.holder.generation
        # a graph must not swap weights: what it would keep aside is not what was there
        if call.fold and generation is not None and not generation.folded and not torch.compiler.is_compiling():
            fold(self.base, self.holder, generation, tuple(self.experts.names), decision.weights[0, 0])

    def _in_force(self, decision: Decision) -> InForce:
        names, weights, rows = tuple(self.experts.names), decision.weights, decision.rows
        how = {"form": self.config.mixing_form, "recompute_shrink": self.config.recompute_shrink}
        if not rows.forced:
            return InForce(names, weights, decision.active, **how)
        columns = tuple(-1 if column is None else column for column in rows.columns or ())
        if self.experts.touch_all and torch.is_grad_enabled():
            return InForce(names, weights, rows=columns, **how)
        used = sorted({column for column in columns if column >= 0})
        if len(set(columns)) == 1:
            return InForce(forced=tuple(names[column] for column in used))
        # unused experts must get no gradient, not a zero one
        place = {-1: -1, **{column: i for i, column in enumerate(used)}}
        by_row = tuple(place[column] for column in columns)
        return InForce(tuple(names[column] for column in used), weights[..., used], rows=by_row, **how)

    # ------------------------------------------------------------------ what surrounds a pass

    def _prepare(self) -> None:
        if torch.compiler.is_compiling():
            return
        generation = self.holder.generation
        if generation is not None and self.call is None:  # an interrupt left it behind
            unfold(self.holder, generation)
            self.holder.generation = generation = None
        if generation is None or not generation.folded:
            check_not_bypassed(self.holder)
        if self.mixture.training:
            keep_routing_in_checkpoints(self._checkpointable, self.holder)
            _undo_input_require_grads(self.base)

    @property
    def _compiled(self) -> bool:
        return self.base._compiled_call_impl is not None

    def _fold_ahead(self, call: Call) -> None:
        """Fold a mixture that is known before the first pass, for a base whose passes are compiled."""
        weights = call.one_hot if call.weights is None else call.weights
        generation = self.holder.generation
        if weights is not None and generation is not None:
            fold(self.base, self.holder, generation, tuple(self.experts.names), weights[0, 0])


def _undo_input_require_grads(base: Any) -> None:
    """Backward must stop at layer k, so the embeddings' output must not require gradients.

    transformers forgets the hooks of all calls of `enable_input_require_grads` but the last.
    """
    base.disable_input_require_grads()
    hooks = base.get_input_embeddings()._forward_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
            del hooks[key]
