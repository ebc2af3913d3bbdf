"""What the library sees of a text: the states that enter layer k of the frozen base, layer-normalised.

Every row goes through the layers by itself, in evaluation mode and without gradients, so that its states depend on
nothing but the row: the same rows in batches of four gave sums that were 1e-8 other ones. Shapes: S tokens of a row,
D width of a state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dylora_moe.base.placement import Placement
from dylora_moe.routing.router import normalised

WINDOW = 1024
"""Tokens of a row that the base sees at once, or as many as it has positions for."""


class Row(NamedTuple):
    """A text as the base reads it.

    Attributes:
        ids: of prompt and completion.
        prompt: how many of them are the prompt; 0 for plain text.
    """

    ids: Sequence[int]
    prompt: int

    @property
    def key(self) -> int:
        """A number that is the same for the same row everywhere."""
        text = f"{self.prompt} {','.join(map(str, self.ids))}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)


class RowStates(NamedTuple):
    """The states of one row but for its last token, after which nothing is said.

    Attributes:
        row: the text.
        states: float32 `[S-1, D]`.
        prompt: bool `[S-1]`, which of them are the prompt's.
        early: float64 `[D]`, the mean of the prompt's states where they enter layer k // 2; of all for plain text.
    """

    row: Row
    states: Tensor
    prompt: Tensor
    early: Tensor


class _Reached(Exception):
    """The states are there; the rest of the base need not run."""


def states_of(base: nn.Module, placement: Placement, k: int, row: Row, window: int = WINDOW) -> RowStates:
    """What enters layer k of a bare base in evaluation mode; the final hidden state for k = L.

    Args:
        base: the causal language model, which must be bare or routed to the bare base now.
        placement: where its decoder layers are.
        k: the layer.
        row: the text, of at least two tokens.
        window: longer rows are cut into windows of so many tokens, each read from its beginning.
    """
    found = [_enter(base, placement, k, part) for part in torch.tensor(list(row.ids)).split(window)]
    early, states = (normalised(torch.cat(windows))[:-1].cpu() for windows in zip(*found, strict=True))
    prompt = torch.arange(len(states)) < row.prompt
    return RowStates(row, states, prompt, early[prompt if prompt.any() else ~prompt].double().mean(0))


def window_of(base: Any) -> int:
    """`WINDOW`, or fewer where the base has no more positions."""
    return min(WINDOW, positions_of(base) or WINDOW)


def positions_of(base: Any) -> int | None:
    """How many positions a base has, if its configuration says so."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block every one of `modules` is in evaluation mode and nothing keeps gradients."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _enter(base: nn.Module, placement: Placement, k: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`[S, D]` of one window where it enters layer k // 2, and where it enters layer k."""
    found: list[Tensor] = []

    def on_the_way(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    def before_layer(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        on_the_way(layer, args, kwargs)
        raise _Reached

    def after_decoder(decoder: nn.Module, args: Any, output: Any) -> None:
        found.append(output.last_hidden_state)
        raise _Reached

    layers = placement.layers(base)
    handles = [layers[k // 2].register_forward_pre_hook(on_the_way, with_kwargs=True)]
    if k < placement.num_layers:
        handles.append(layers[k].register_forward_pre_hook(before_layer, with_kwargs=True))
    else:
        handles.append(placement.decoder(base).register_forward_hook(after_decoder))
    ids = ids[None].to(next(base.parameters()).device)
    call: Any = base._call_impl  # past what `compile` put before it: a graph is left by no exception
    try:
        call(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    early, late = (placement.state_of(state)[0].detach() for state in found)
    return early, late
