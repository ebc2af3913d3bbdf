"""The hooks that route every pass through the base, whoever starts it.

`generate`, TRL and pipelines call the inner model, so all per-call state starts in the decoder's pre-hook. With the
experts above the router layer the router reads on the way up (one pass); otherwise the frozen base first runs up to
the router layer without gradients (the routing pass).

Shapes: B batch, S sequence, D hidden, E experts, n router outputs, k router layer, L decoder layers.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from . import routing as policies
from .fold import fold, unfold
from .recompute import keep_routing_in_checkpoints
from .request import BASE, Decision, Request
from .sharding import is_sharded

if TYPE_CHECKING:
    from .model import DyLoraMoE


def start_pass(model: DyLoraMoE, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Decoder pre-hook: decide the routing, or leave it pending until layer k runs."""
    if args:
        kwargs = {**inspect.signature(type(decoder).forward).bind(decoder, *args).arguments, **kwargs}
        kwargs.pop("self", None)
    model.routing.form = model.moe_config.mixing_form
    model.routing.recompute_shrink = model.moe_config.recompute_shrink
    model.routing.force([])  # whatever runs before the router has read is the bare base
    request = model._request
    if request is None:
        request = Request(experts=model._default_experts)
    ids = kwargs.get("input_ids")
    batch, length = (ids if ids is not None else kwargs["inputs_embeds"]).shape[:2]
    decision = Decision(batch, length, mask=_real_tokens(request, kwargs.get("attention_mask"), batch, length))
    request.decision, model._current = decision, request
    if model.routing.folded and model.routing.folded_by is not request:  # a call within a generation that folds
        unfold(model)
    if not torch.compiler.is_compiling():
        if not model.routing.folded:
            _check_not_bypassed(model)
        if model.training:
            keep_routing_in_checkpoints(decoder, model.routing)
            _undo_input_require_grads(model.get_base_model())
    if model._adapters_disabled:
        return (), kwargs
    if request.weights is not None:
        decision.weights = _per_row(request.weights, batch)
        model.routing.mix(tuple(model.expert_names), decision.weights)
        _fold(model, request, decision)
        return (), kwargs
    if torch.compiler.is_compiling() and request.one_hot is not None:  # one graph for every forced expert
        decision.weights = _per_row(request.one_hot, batch)
        model.routing.mix(tuple(model.expert_names), decision.weights, active=1)
        return (), kwargs
    decision.columns = _columns(model, request, batch)
    if decision.forced and not (model.touch_all_experts and torch.is_grad_enabled()):
        _force(model, decision)
        _fold(model, request, decision)
        return (), kwargs
    if (
        not decision.forced
        and model.moe_config.granularity == "sequence"
        and request.held is None
        and _filled(kwargs.get("past_key_values"))
    ):
        raise ValueError(
            "sequence granularity decides on the prompt, which is in the cache already: generate with model.generate, "
            "or pass routing_weights=output.routing_weights[:, -1] of the prompt's pass."
        )
    if request.held is not None:
        _decide(model, decision, _per_row(request.held, batch))
        _fold(model, request, decision)
    elif not model._needs_routing_pass:
        decision.pending = True
    else:
        kwargs, hidden = routing_pass(model, decoder, kwargs)
        read(model, hidden)
    return (), kwargs


def read(model: DyLoraMoE, hidden: Tensor) -> None:
    """Score `hidden [B, S, D]` and put the resulting weights in force."""
    request = model._current
    assert request is not None
    assert request.decision is not None
    decision = request.decision
    decision.pending = False
    hidden = hidden.detach()
    first = next(model.router.parameters())
    if not is_sharded(first):  # else FSDP places it; a base over several devices moves the layer's input after us
        hidden = hidden.to(first.device)
    scores = model.router(hidden)
    if decision.forced:
        weights = _one_hot(model, decision).to(scores.device) + scores.sum() * 0
        decision.weights = weights
        model.routing.mix(tuple(model.expert_names), weights)
        return
    prompt = None
    if model.moe_config.granularity == "sequence":
        prompt = _prompt_tokens(request, decision, scores.device)
        scores = sequence_scores(scores, prompt)
        request.held = scores
    if model._records is not None and model.training:
        model._records.append(RouterRecord(hidden, prompt, decision.routed_mask(hidden.device)))
    _decide(model, decision, scores)
    _fold(model, request, decision)


class RouterRecord:
    """The frozen input of one scored pass, kept by a trainer to score it again over the whole optimizer step.

    Args:
        hidden: `[B, S, D]`, detached.
        prompt: `[B, S]` bool, for sequence granularity.
        mask: `[B, S]` bool of the tokens that count, or None for all.
    """

    def __init__(self, hidden: Tensor, prompt: Tensor | None, mask: Tensor | None):
        self.hidden, self.prompt, self.mask = hidden, prompt, mask

    def score(self, router: nn.Module) -> Tensor:
        """Router scores `[tokens, n]` of the tokens that count."""
        scores = router(self.hidden)
        if self.prompt is not None:
            scores = sequence_scores(scores, self.prompt).expand(-1, self.hidden.shape[1], -1)
        return scores.flatten(0, 1) if self.mask is None else scores[self.mask]


def sequence_scores(scores: Tensor, prompt: Tensor) -> Tensor:
    """Mean of `scores [B, S, n]` over the prompt tokens `[B, S]`: `[B, 1, n]`; zeros where there is none."""
    kept = prompt.unsqueeze(-1).to(scores.dtype)
    return (scores * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)


def _decide(model: DyLoraMoE, decision: Decision, scores: Tensor) -> None:
    """Apply the policy to `scores [B, S or 1, n]` and mix."""
    fresh = model._new_columns()
    if fresh:
        outputs = torch.arange(scores.shape[-1], device=scores.device)
        masked = torch.isin(outputs, torch.tensor(fresh, device=scores.device))
        scores = scores.masked_fill(masked, float("-inf"))
    shares = model._policy(scores)
    weights = shares[..., : model.num_experts]
    if decision.columns is not None:
        forced = _one_hot(model, decision)
        routed = torch.tensor([c is None for c in decision.columns], device=weights.device)[:, None, None]
        weights = torch.where(routed, weights, forced.to(weights))
    decision.logits = scores.expand(-1, decision.length, -1)
    decision.shares = shares.expand(-1, decision.length, -1)
    decision.weights = weights
    model.routing.mix(tuple(model.expert_names), weights, model._active_experts())


def _force(model: DyLoraMoE, decision: Decision) -> None:
    """All rows are forced: PEFT's own forward if to the same expert, else one-hot weights of the experts used."""
    names = model.expert_names
    columns = [c for c in decision.columns or [] if c is not None]
    used = sorted({c for c in columns if c >= 0})
    decision.weights = one_hot = _one_hot(model, decision)
    if len(set(columns)) == 1:
        model.routing.force([names[c] for c in used])
    else:  # unused experts must get no gradient, not a zero one
        model.routing.mix(tuple(names[c] for c in used), one_hot[..., used])


def _fold(model: DyLoraMoE, request: Request, decision: Decision) -> None:
    """Fold the weights of this pass, which are those of every further one, if the request says so."""
    if torch.compiler.is_compiling():  # a graph must not swap weights: what it would keep aside is not what was there
        return
    if request.fold and not model.routing.folded and decision.weights is not None:
        model.routing.folded_by = request
        fold(model, decision.weights[0, 0])


def fold_ahead(model: DyLoraMoE, request: Request) -> None:
    """Fold a mixture that is known before the first pass, for a base whose passes are compiled."""
    weights = request.one_hot if request.weights is None else request.weights
    if weights is not None:
        model.routing.folded_by = request
        fold(model, weights[0, 0])


def forced_weights(model: DyLoraMoE, request: Request) -> Tensor | None:
    """`[B or 1, 1, E]` one-hot weights of a request that forces every row; None for others."""
    entries = [request.experts] if isinstance(request.experts, str) else request.experts
    if entries is None or None in entries:
        return None
    columns = _columns(model, request, len(entries)) or []
    columns = [None if c == -1 else c for c in columns]
    return policies.one_hot_weights(columns, model.num_experts, next(model.router.parameters()).device)


def _one_hot(model: DyLoraMoE, decision: Decision) -> Tensor:
    """`[B, 1, E]` weights of the forced rows; those of routed rows are zero."""
    columns = [c if c is not None and c >= 0 else None for c in decision.columns or []]
    return policies.one_hot_weights(columns, model.num_experts, next(model.router.parameters()).device)


def _columns(model: DyLoraMoE, request: Request, batch: int) -> list[int | None] | None:
    experts = request.experts
    if experts is None:
        return None
    entries = [experts] * batch if isinstance(experts, str) else list(experts)
    if batch % len(entries):
        raise ValueError(f"experts has {len(entries)} entries for a batch of {batch} rows; give one name per row.")
    repeat = batch // len(entries)  # beams
    place = {None: None, BASE: -1, **{name: i for i, name in enumerate(model.expert_names)}}
    columns = [place[name] for name in entries for _ in range(repeat)]
    return None if all(c is None for c in columns) else columns


def _per_row(tensor: Tensor, batch: int) -> Tensor:
    """Repeat the rows of `tensor [B, …]` for beams; a single row stands for all."""
    rows = tensor.shape[0]
    return tensor if rows in (1, batch) or batch % rows else tensor.repeat_interleave(batch // rows, dim=0)


def _real_tokens(request: Request, mask: Any, batch: int, length: int) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = request.attention_mask
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < length:
        return None
    return _per_row(mask[:, -length:].bool(), batch)


def _prompt_tokens(request: Request, decision: Decision, device: torch.device) -> Tensor:
    """`[B, S]` bool: the real tokens that decide the routing of their sequence."""
    advice = 'granularity="token" has no such limit.'
    if request.packed_rows:
        raise ValueError(f"packed rows hold several sequences, which cannot share one sequence's routing; {advice}")
    prompt = torch.ones(decision.batch, decision.length, dtype=torch.bool, device=device)
    if decision.mask is not None:
        prompt = decision.mask.to(device).expand_as(prompt)
    if request.prompt_length is not None:
        if decision.length < request.prompt_length:
            raise ValueError(
                f"sequence granularity needs the whole prompt of {request.prompt_length} tokens in one pass, got "
                f"{decision.length} (chunked prefill, or a cache that was filled before); {advice}"
            )
        return prompt & (torch.arange(decision.length, device=device) < request.prompt_length)
    if request.labels is not None:
        before = (request.labels != -100).to(device).cumsum(1) == 0
        without = (prompt.any(1) & ~(prompt & before).any(1)).nonzero().flatten().tolist()
        if without:
            raise ValueError(
                f"rows {without} have no prompt before their first label, so nothing may decide their routing: "
                f"completion tokens never do. Mask the prompt in the labels with -100; {advice}"
            )
        return prompt & before
    return prompt


def routing_pass(model: DyLoraMoE, decoder: nn.Module, kwargs: dict) -> tuple[dict, Tensor]:
    """Run the bare base up to layer k without gradients: the main pass' keyword arguments, and `hidden [B, S, D]`."""
    k, placement = model.router_layer_index, model.placement
    kwargs = dict(kwargs)
    own = _own_cache(model, decoder, kwargs) if k > 0 else None
    inputs = {**kwargs, "past_key_values": own, "use_cache": own is not None}
    inputs |= {"output_hidden_states": False, "output_attentions": False}
    layers = placement.layers(model.get_base_model())
    probe = _Probe()
    try:
        if k < placement.num_layers:
            setattr(decoder, placement.layers_name, nn.ModuleList([*layers[:k], probe]))
        with torch.no_grad():
            output = decoder.forward(**inputs)
    finally:
        setattr(decoder, placement.layers_name, layers)
    return kwargs, output.last_hidden_state if probe.hidden is None else probe.hidden


class _Probe(nn.Module):
    """Stands in for layer k and keeps what would enter it."""

    hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states
        return hidden_states


def _filled(cache: Any) -> bool:
    return isinstance(cache, Cache) and len(cache.layers) > 0 and cache.get_seq_length() > 0


def _own_cache(model: DyLoraMoE, decoder: Any, kwargs: dict) -> Cache | None:
    """The k layers of cache for the routing pass; None if the call keeps none.

    At token granularity they are k extra layers at the end of the main pass' cache (made here if the decoder would make
    one), so that reorder, crop and repeat reach them. At sequence granularity only the prompt's pass decides, and its
    states are of no further use; but the mask was made for a cache like the main one.
    """
    k, count = model.router_layer_index, model.placement.num_layers
    per_token = model.moe_config.granularity == "token"
    cache, use = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if use is None:
        use = getattr(decoder.config, "use_cache", False)
    checkpointing = model.training and getattr(decoder, "gradient_checkpointing", False)
    if checkpointing or (cache is None and not (use and per_token)):
        return None
    if cache is None:
        cache = kwargs["past_key_values"] = _with_layers(DynamicCache(config=decoder.config), count)
        cache.layers.extend(
            _with_layers(DynamicCache(config=decoder.config), count).layers[:k]
        )  # no deepcopy: it cannot compile
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values of type {type(cache).__name__}: pass a transformers Cache.")
    _with_layers(cache, count)
    if not per_token:
        return Cache(layers=copy.deepcopy(cache.layers[:k]))
    if len(cache.layers) == count and not _filled(cache):
        cache.layers.extend(copy.deepcopy(cache.layers[:k]))
    own: Any = cache.layers[count] if len(cache.layers) == count + k else None
    seen = -1 if own is None else own.get_seq_length()
    if seen != cache.get_seq_length():
        raise ValueError(
            "this cache was filled without the routing pass (by a forced or base pass); start the routed sequence with "
            "an empty cache, or keep forcing the expert."
        )
    return Cache(layers=cache.layers[count:])


def _with_layers(cache: Cache, count: int) -> Cache:
    """`cache` with at least `count` layers, if it makes them on demand."""
    while len(cache.layers) < count and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache


def _undo_input_require_grads(base: Any) -> None:
    """Backward must stop at layer k, so the embeddings' output must not require gradients.

    transformers forgets the hooks of all calls of `enable_input_require_grads` but the last.
    """
    base.disable_input_require_grads()
    hooks = base.get_input_embeddings()._forward_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
            del hooks[key]


def _check_not_bypassed(model: DyLoraMoE) -> None:
    for layer in model._layers:
        if "forward" in layer.__dict__:
            raise ValueError(
                f"{layer.routing_name}: something replaced the layer's `forward` (accelerate's hooks do), which would "
                "silently bypass the experts; dispatch or hook the base before the mixture is built."
            )
