"""What is measured of a model on held-out examples: the table of metrics.

A metric is added by a row in `METRICS`; recipes, runs and reports take its name, its values and its words from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the table is read by recipes, which are checked without torch
    from transformers import PreTrainedTokenizerBase

    from dylora_moe.data.examples import Example

    from .held_out import Measured, Progress


@dataclass(frozen=True)
class Settings:
    """How held-out examples are put to a model.

    Args:
        batch_size: rows per batch.
        max_new_tokens: where generation stops at the latest.
        max_length: of prompt and completion together, in tokens; default no limit.
        chat: whether prompts go through the chat template.
    """

    batch_size: int = 32
    max_new_tokens: int = 48
    max_length: int | None = None
    chat: bool = False


class Measure(Protocol):
    """Computes a metric: domain → value; `force` goes to the model, for example `experts="base"`."""

    def __call__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        settings: Settings,
        progress: Progress,
        **force: Any,
    ) -> dict[str, Measured]: ...


@dataclass(frozen=True)
class Metric:
    """A way to measure a model on held-out examples.

    Args:
        measure: computes it.
        title: what it is called.
        unit: of its values; `%` for shares, which are shown a hundredfold.
        meaning: what it is, as the beginning of a sentence.
        generates: whether it judges answers to prompts, which plain text does not have; otherwise it reads the
            completions, and an example too long to be read whole is left out.
        higher_is_better: whether a greater value is the better one.
    """

    measure: Measure
    title: str
    unit: str
    meaning: str
    generates: bool
    higher_is_better: bool

    @property
    def is_share(self) -> bool:
        """Whether its values lie between 0 and 1."""
        return self.unit == "%"

    @property
    def sentence(self) -> str:
        """What it is and which way is better."""
        return f"{self.meaning}; {'higher' if self.higher_is_better else 'lower'} is better."


def measure_exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: Settings,
    progress: Progress,
    **force: Any,
) -> dict[str, Measured]:
    """Share of greedy answers that equal the completion, per domain."""
    from .held_out import answers, exact_match

    texts = answers(
        model,
        tokenizer,
        examples,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        chat=settings.chat,
        progress=progress,
        **force,
    )
    return exact_match(texts, examples, tokenizer, settings.chat)


def measure_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: Settings,
    progress: Progress,
    **force: Any,
) -> dict[str, Measured]:
    """Mean cross-entropy per completion token, per domain."""
    from .held_out import completion_loss

    return completion_loss(
        model,
        tokenizer,
        examples,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        chat=settings.chat,
        progress=progress,
        **force,
    )


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        measure_exact_match,
        title="exact match",
        unit="%",
        meaning="Share of the held-out examples answered exactly",
        generates=True,
        higher_is_better=True,
    ),
    "loss": Metric(
        measure_loss,
        title="loss",
        unit="nats per completion token",
        meaning="Loss on the held-out completions in nats per token",
        generates=False,
        higher_is_better=False,
    ),
}
"""Name in recipes and in `results.json` → metric; the first is the default."""
DEFAULT_METRIC = next(iter(METRICS))
