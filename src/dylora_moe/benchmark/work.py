"""The work of a run, done by each of its variants: whole models.

Shapes: B batch, S sequence, V vocabulary, n new tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dylora_moe.routing.policies import dense

from .kinds import Kind
from .models import Models, Unavailable, mixing_form
from .settings import SHAPES, Settings


@dataclass
class Runner:
    """One variant, ready to run.

    Attributes:
        key: of the kind, with `/E` where it differs with E.
        title: for tables.
        model: whose parameters do not count as saved.
        forward: the work's forward pass: the loss in training, else the output (logits; token ids when decoding).
        step: what is timed; in training forward and backward.
        in_force: a context in which both must be called; entering it is not timed.
        sections: the modules in which GEMMs are counted: the decoder layers, or the one linear layer.
        layers: the adapted linear layers (in the bare base: those that others adapt).
        passes: forward passes of the base that the bare base needs for the work.
    """

    key: str
    title: str
    experts: int | None
    model: nn.Module
    forward: Callable[[], Tensor]
    step: Callable[[], Any]
    in_force: Callable[[], AbstractContextManager[Any]] = nullcontext
    sections: list[nn.Module] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)
    passes: int = 1

    @property
    def adapted(self) -> float:
        """Adapted layers in each section, on average."""
        return len(self.layers) / len(self.sections)


def model_runner(settings: Settings, models: Models, key: str, kind: Kind, experts: int | None) -> Runner:
    """One variant of a training step, a prefill or a generation."""
    model = model_of(settings, models, kind, experts)
    ids = inputs(settings, models)
    arguments: dict[str, Any] = {}
    if kind.forced:
        arguments["experts"] = model.expert_names[0]
    if kind.by_row:
        names = model.expert_names
        arguments["experts"] = [names[row % len(names)] for row in range(settings.batch)]
    if kind.fold:
        if settings.batch > 1 and not kind.forced:
            raise Unavailable("several rows decide a mixture each; one is folded at a time (--batch 1)")
        arguments["fold"] = True
    caller = _MixedPasses(model) if kind.family == "passes" else model
    whole = settings.shape not in SHAPES or SHAPES[settings.shape].whole_loss
    count = settings.new_tokens

    def loss() -> Any:
        if not whole:
            logits = caller(input_ids=ids, use_cache=False, logits_to_keep=1, **arguments).logits
            return logits.float().square().mean()
        return caller(input_ids=ids, labels=ids, use_cache=False, **arguments).loss

    def prefill() -> Tensor:
        with torch.no_grad():
            return caller(input_ids=ids, use_cache=kind.family != "xlora", logits_to_keep=1, **arguments).logits

    def decode() -> Tensor:
        fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return caller.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed, **arguments)

    forward = {"train": loss, "prefill": prefill, "decode": decode}[settings.work]
    base = _bare_base(model)
    return Runner(
        key=key,
        title=title_of(settings, kind, experts),
        experts=experts,
        model=model,
        forward=forward,
        step=(lambda: forward().backward()) if settings.work == "train" else forward,
        in_force=lambda: _in_force(settings, model, kind, experts),
        sections=list(models.placement.layers(base)),
        layers=[base.get_submodule(path) for path in models.targets],
        passes=count if settings.work == "decode" else 1,
    )


def model_of(settings: Settings, models: Models, kind: Kind, experts: int | None) -> Any:
    """The model of a variant."""
    if kind.family == "base":
        return models.bare()
    if kind.family == "peft":
        return models.peft(settings.rank * (experts or 1), kind.same_dtype)
    assert experts is not None
    return models.xlora(experts) if kind.family == "xlora" else models.mixture(experts, kind.dropout)


def title_of(settings: Settings, kind: Kind, experts: int | None) -> str:
    """A variant's name for readers."""
    rank = settings.rank
    title = kind.title.format(r=rank, R=rank * (experts or 1), E=experts, k=settings.top_k)
    return title if experts is None else f"{title}, E={experts}"


def inputs(settings: Settings, models: Models) -> Tensor:
    """Token ids `[B, S]`."""
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = models.base.config.vocab_size
    shape = (settings.batch, settings.length)
    return models.give(torch.randint(0, vocabulary, shape, generator=generator))


@contextmanager
def _in_force(settings: Settings, model: Any, kind: Kind, experts: int | None) -> Iterator[None]:
    model.zero_grad(set_to_none=True)
    if kind.family != "ours":
        yield
        return
    set_policy(settings, model, kind, experts)
    with mixing_form(model, kind.form):
        yield


def set_policy(settings: Settings, model: Any, kind: Kind, experts: int | None) -> None:
    """Dense or top-k weights, per token or per sequence."""
    config = model.moe_config
    config.top_k = settings.top_k if kind.sparse else experts
    config.train_top_k = settings.top_k if kind.sparse else None
    config.granularity = kind.granularity


def _bare_base(model: Any) -> Any:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


@dataclass
class _Mixed:
    logits: Tensor
    loss: Tensor | None = None


class _MixedPasses:
    """A pass per expert, their logits mixed: what one does without a mixture inside the layers.

    The weights come from the mixture's own router, on the embeddings.
    """

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> _Mixed:
        logits = self._mixed(input_ids, [dict(kwargs) for _ in self.model.expert_names])
        if labels is None:
            return _Mixed(logits)
        return _Mixed(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, **kwargs: Any) -> Tensor:
        """Greedily, with a cache per expert."""
        ids = latest = input_ids
        states: list[dict[str, Any]] = [{"use_cache": True, "logits_to_keep": 1} for _ in self.model.expert_names]
        for _ in range(max_new_tokens):
            latest = self._mixed(latest, states)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, latest], dim=1)
        return ids

    def _mixed(self, ids: Tensor, arguments: list[dict[str, Any]]) -> Tensor:
        with torch.no_grad():
            embedded = self.model.get_input_embeddings()(ids)
        weights = dense(self.model.router(embedded), self.model.moe_config.temperature)
        mixed: Tensor | float = 0.0
        for i, name in enumerate(self.model.expert_names):
            output = self.model(input_ids=ids, experts=name, **arguments[i])
            if arguments[i].get("use_cache"):
                arguments[i]["past_key_values"] = output.past_key_values
            logits = output.logits
            mixed = mixed + weights[:, -logits.shape[1] :, i, None].to(logits.dtype) * logits
        return mixed  # type: ignore[return-value]
