"""Measuring a mixture on the held-out examples of a recipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.examples import Example
from dylora_moe.evaluation.held_out import Measured, answers, by_domain, completion_loss
from dylora_moe.evaluation.metrics import METRICS, Settings
from dylora_moe.model import DyLoraMoE
from dylora_moe.routing.trace import RoutingTrace
from dylora_moe.training.recipe.sections import Recipe

ROUTED_SAMPLE = 32
"""Examples per domain whose routing is recorded."""
LINE_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""


class Measurement:
    """Held-out numbers of one recipe.

    Args:
        recipe: its `eval` section says what to measure.
        tokenizer: of the base.
        test: the held-out examples of all domains.
        console: where progress is shown.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, test: list[Example], console: Console):
        self.recipe, self.tokenizer, self.test, self.console = recipe, tokenizer, test, console
        length = recipe.train.arguments.get("max_length") or tokenizer.model_max_length
        self.settings = Settings(recipe.eval.batch_size, recipe.eval.max_new_tokens, length, recipe.base.chat)

    def column(self, model: Any, title: str, **force: Any) -> dict[str, Measured]:
        """The metric per domain; `force` goes to the model, for example `experts="base"`."""
        if not self.test:
            return {}
        measure, values = METRICS[self.recipe.eval.metric].measure, {}
        with self._bar(title, len(self.test)) as progress:
            for examples in by_domain(self.test).values():
                values |= measure(model, self.tokenizer, examples, self.settings, progress, **force)
        return values

    def routings(self, mixture: DyLoraMoE) -> Iterator[tuple[str, dict[str, Measured]]]:
        """Columns of the mixture under dense, top-1 and top-2 routing, each k once; its own `top_k` is put back."""
        default, outputs = mixture.moe_config.top_k, mixture.router.num_outputs
        kept = {"mixture": outputs} | {name: k for name, k in {"top1": 1, "top2": 2}.items() if k < outputs}
        try:
            for name, k in kept.items():
                mixture.moe_config.top_k = k
                yield name, self.column(mixture, name)
        finally:
            mixture.moe_config.top_k = default

    def routing(self, mixture: DyLoraMoE) -> dict[str, dict[str, Any]]:
        """Per domain: load, entropy, mean largest weight and co-activation of the experts, on a sample."""
        result, how = {}, {"batch_size": self.settings.batch_size, "chat": self.settings.chat}
        for domain, examples in by_domain(self.test).items():
            with mixture.trace() as trace:
                completion_loss(mixture, self.tokenizer, examples[:ROUTED_SAMPLE], **how)
            result[domain] = {"load": trace.load(), **_sharpness(trace)}
        return result

    def same_answers(self, mixture: DyLoraMoE, other: DyLoraMoE, per_domain: int = 4) -> bool | None:
        """Whether two mixtures answer a sample of the examples alike; None without held-out data."""
        sample = [example for examples in by_domain(self.test).values() for example in examples[:per_domain]]
        if not sample:
            return None
        return self._answers(mixture, sample, "saved") == self._answers(other, sample, "reloaded")

    def _answers(self, model: Any, test: list[Example], title: str) -> list[str]:
        how = {"batch_size": self.settings.batch_size, "max_new_tokens": self.settings.max_new_tokens}
        texts: list[str] = []
        with self._bar(title, len(test)) as progress:
            for examples in by_domain(test).values():
                texts += answers(model, self.tokenizer, examples, chat=self.settings.chat, progress=progress, **how)
        return texts

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Any]:
        """Progress over so many examples: a bar, or where there is no terminal a line at least every few seconds."""
        if not self.console.is_terminal:
            lines = _Lines(self.console, f"evaluate {title}", total)
            yield lines.advance
            return
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(f"evaluate {title}", total=total)
            yield lambda done: progress.advance(task, done)


class _Lines:
    """Progress as lines of text, the last one always and the others `LINE_SECONDS` apart."""

    def __init__(self, console: Console, title: str, total: int):
        self.console, self.title, self.total, self.done = console, title, total, 0
        self.printed = time.monotonic()

    def advance(self, done: int) -> None:
        """Note that so many more are done."""
        self.done += done
        if self.done >= self.total or time.monotonic() - self.printed >= LINE_SECONDS:
            self.printed = time.monotonic()
            self.console.print(f"{self.title} {self.done}/{self.total}", highlight=False, markup=False)


def _sharpness(trace: RoutingTrace) -> dict[str, Any]:
    tokens = torch.cat([weights[mask] for weights, mask in zip(trace.passes, trace.masks, strict=True)])
    active = (tokens > 0).double()
    together = (active.T @ active / max(len(tokens), 1)).tolist()
    names = trace.names[: tokens.shape[-1]]
    return {
        "entropy": trace.entropy(),
        "max_probability": float(tokens.max(-1).values.mean()) if len(tokens) else 0.0,
        "coactivation": {name: dict(zip(names, row, strict=True)) for name, row in zip(names, together, strict=True)},
    }
