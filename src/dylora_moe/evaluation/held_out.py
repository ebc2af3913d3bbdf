"""Held-out measurements of one model on several domains: answers, exact match, loss per completion token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.examples import Example, encode, encode_prompt, reference

Progress = Callable[[int], None]
RESAMPLES = 1000
BOUNDS = (0.025, 0.975)
"""Between which of the resampled values the interval lies."""


@dataclass(frozen=True)
class Measured:
    """A number measured on some rows.

    Attributes:
        value: the number.
        rows: of which it is the mean.
        low: from where its 95 % bootstrap interval goes,
        high: and to where.
    """

    value: float
    rows: int
    low: float
    high: float


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 48,
    chat: bool = False,
    progress: Progress = lambda done: None,
    **generate: Any,
) -> list[str]:
    """Greedy answers to the prompts of `examples`, stripped.

    Args:
        model: anything with `generate`.
        tokenizer: of the base; its padding side is left alone.
        examples: any number; batched by length, so that little is padded.
        batch_size, max_new_tokens: of the generation.
        chat: the prompt's form, as in training.
        progress: called with the number of examples done since the last call.
        generate: further arguments of `generate`, such as `experts=`.
    """
    model.eval()
    prompts = [encode_prompt(example, tokenizer, chat) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    texts = [""] * len(examples)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=ids.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            **generate,
        )
        for row, text in zip(rows, tokenizer.batch_decode(output[:, width:], skip_special_tokens=True), strict=True):
            texts[row] = text.strip()
        progress(len(rows))
    return texts


def exact_match(
    texts: Sequence[str], examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, chat: bool = False
) -> dict[str, Measured]:
    """Share of answers equal to the completion (both stripped), per domain."""
    right = [float(t == reference(e, tokenizer, chat)) for t, e in zip(texts, examples, strict=True)]
    return _per_domain(examples, right, [1.0] * len(texts))


@torch.no_grad()
def completion_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    chat: bool = False,
    progress: Progress = lambda done: None,
    **forward: Any,
) -> dict[str, Measured]:
    """Mean cross-entropy in nats per completion token, per domain, every token weighing the same.

    Args:
        model: a causal language model that takes `labels`.
        max_length: longer examples are cut at the end, as in training.
        forward: further arguments of the model, such as `experts=`.
    """
    model.eval()
    encoded = [encode(example, tokenizer, chat) for example in examples]
    encoded = [(ids[:max_length], prompt) for ids, prompt in encoded]
    order = sorted(range(len(examples)), key=lambda i: len(encoded[i][0]))
    sums, counts = [0.0] * len(examples), [0.0] * len(examples)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(encoded[i][0]) for i in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for position, i in enumerate(rows):
            tokens, prompt = encoded[i]
            ids[position, : len(tokens)] = torch.tensor(tokens)
            mask[position, : len(tokens)] = 1
            labels[position, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        ids, mask, labels = (tensor.to(model.device) for tensor in (ids, mask, labels))
        logits = model(input_ids=ids, attention_mask=mask, labels=labels, **forward).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
        for position, i in enumerate(rows):
            sums[i] = float(losses[position].sum())
            counts[i] = float((labels[position, 1:] != -100).sum())
        progress(len(rows))
    return _per_domain(examples, sums, counts)


def domains_of(examples: Sequence[Example]) -> list[str]:
    """The domains in order of appearance."""
    return list(dict.fromkeys(example.domain for example in examples))


def by_domain(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """The examples of each domain."""
    return {domain: [e for e in examples if e.domain == domain] for domain in domains_of(examples)}


def _per_domain(examples: Sequence[Example], sums: Sequence[float], counts: Sequence[float]) -> dict[str, Measured]:
    result = {}
    for domain in domains_of(examples):
        inside = [i for i, example in enumerate(examples) if example.domain == domain]
        result[domain] = measured([sums[i] for i in inside], [counts[i] for i in inside])
    return result


def measured(sums: Sequence[float], counts: Sequence[float]) -> Measured:
    """Σ sums / Σ counts, with the percentile bootstrap over rows (Efron 1979): the same numbers give the same bounds.

    Args:
        sums: of each row.
        counts: of each row, what its sum is over.
    """
    pairs = torch.tensor([list(sums), list(counts)], dtype=torch.float64)
    total, count = pairs.sum(1).tolist()
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(0))
    top, bottom = pairs[:, drawn].sum(-1)
    low, high = torch.quantile(top / bottom.clamp(min=1.0), torch.tensor(BOUNDS, dtype=torch.float64)).tolist()
    return Measured(total / max(count, 1.0), len(sums), low, high)
