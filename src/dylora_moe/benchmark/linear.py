"""The work of a run on one linear layer of the shape's width: forward, forward and backward, or one token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dylora_moe.layers.in_force import Generation, InForce

from .kinds import Kind
from .models import Models, mixing_form
from .settings import Settings
from .work import Runner, inputs, model_of, set_policy, title_of


def linear_runner(settings: Settings, models: Models, key: str, kind: Kind, experts: int | None) -> Runner:
    """One variant of the layer, with the routing that its model decided for random tokens.

    Deciding it is no part of the work; what the layer makes of the weights is.
    """
    model = model_of(settings, models, kind, experts)
    layer = next(m for path, m in model.named_modules() if path.endswith("q_proj"))
    token = settings.work == "linear-token"
    shape = (1, 1) if token else (settings.batch, settings.length)
    generator = torch.Generator().manual_seed(settings.seed)
    x = models.give(torch.randn(*shape, models.base.config.hidden_size, generator=generator).to(models.dtype))
    dy = models.give(torch.randn(x.shape, generator=generator).to(models.dtype))
    state = None
    if kind.family == "ours":
        set_policy(settings, model, kind, experts)
        with models.running():
            state = routing_state(model, layer, inputs(settings, models)[: shape[0], : shape[1]], kind.form)
    training = settings.work == "linear-train"
    if training:
        x.requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    wanted += [w for w in [state and state.weights] if w is not None and w.requires_grad]

    def forward() -> Tensor:
        with torch.set_grad_enabled(training):
            return layer(x)

    def forward_and_backward() -> None:
        for leaf in wanted:
            leaf.grad = None
        forward().backward(dy)

    return Runner(
        key=key,
        title=title_of(settings, kind, experts),
        experts=experts,
        model=model,
        forward=forward,
        step=forward_and_backward if training else forward,
        in_force=lambda: _in_force(model, state, token),
        sections=[layer],
        layers=[layer],
    )


def routing_state(model: Any, layer: Any, ids: Tensor, form: str) -> InForce:
    """What is in force at `layer` when the model sees `ids`; its weights are a leaf that may receive a gradient."""
    seen: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(model.holder.now))
    try:
        with torch.no_grad(), mixing_form(model, form):
            model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    now = seen[0].again()
    return now if now.weights is None else replace(now, weights=now.weights.detach().requires_grad_(model.training))


@contextmanager
def _in_force(model: Any, state: InForce | None, token: bool) -> Iterator[None]:
    if state is None:
        yield
        return
    holder = model.holder
    with holder.restored(state.again(), None):
        holder.generation = Generation() if token else None  # as within `generate`
        try:
            yield
        finally:
            holder.generation = None
