"""How well a model does a task's held-out rows: the likeliest label, or ROUGE-L of what it writes; and the loss.

Shapes: B rows, S prompt tokens, C labels, M tokens of the longest label, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dylora_moe.data.examples import Example, encode, encode_prompt, reference
from dylora_moe.evaluation.held_out import answers
from dylora_moe.evaluation.held_out import completion_loss as held_out_loss
from loop import padded
from tasks import Task

BATCH = 8
NEW_TOKENS = 32


@torch.no_grad()
def score(model: Any, task: Task, tokenizer: PreTrainedTokenizerBase, **force: Any) -> dict[str, Any]:
    """What a model, routed or forced, makes of the held-out rows of a task.

    Args:
        model: a mixture in evaluation mode.
        task: whose rows.
        tokenizer: of the base.
        force: how to call it, such as `experts="base"`; nothing for routed.

    Returns:
        `score`, the mean over rows in percent (accuracy, or ROUGE-L for tasks without labels); `each`, the rows' own;
        `loss` in nats per completion token; where it is routed, `chosen`: expert → rows that went to it.
    """
    each, chosen, sums, counts = [], [], 0.0, 0
    order = sorted(task.test, key=lambda row: len(row.prompt))
    if task.labels:
        size = BATCH if len(task.labels) <= BATCH else BATCH // 2
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            losses, lengths, names = label_losses(model, rows, task.labels, tokenizer, **force)
            for i, row in enumerate(rows):
                own = task.labels.index(str(row.completion))
                each.append(100.0 * (int(losses[i].argmin()) == own))
                sums, counts = sums + float(losses[i, own]), counts + lengths[i][own]
            chosen += names
        loss = sums / counts
    else:
        texts = answers(model, tokenizer, order, batch_size=BATCH, max_new_tokens=NEW_TOKENS, **force)
        each = [100.0 * rouge_l(text, reference(row, tokenizer)) for text, row in zip(texts, order, strict=True)]
        loss = held_out_loss(model, tokenizer, order, batch_size=BATCH, **force)[task.name].value
        if not force:
            for start in range(0, len(order), BATCH):
                batch = padded([encode_prompt(row, tokenizer) for row in order[start : start + BATCH]])
                chosen += _chosen(model, model(**vars(batch), logits_to_keep=1).routing_weights)
    result: dict[str, Any] = {"score": mean(each), "loss": loss, "each": each}
    return result if force else {**result, "chosen": {name: chosen.count(name) for name in sorted(set(chosen))}}


def label_losses(
    model: Any, rows: Sequence[Example], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, **force: Any
) -> tuple[Tensor, list[list[int]], list[str]]:
    """The loss of every label as a completion of every row.

    The prompts pass once; their cache is repeated for the labels, and routing as a whole sequence is held, as in
    generation.

    Returns:
        nats, summed over the label's tokens and the end of the sequence, `[B, C]`; how many tokens these are; the
        experts chosen, empty where it is forced.
    """
    prompts, endings = [], []
    for row in rows:
        encoded = [encode(Example(row.prompt, label), tokenizer) for label in labels]
        first = min(prompt for _, prompt in encoded)
        prompts.append(encoded[0][0][:first])
        endings += [ids[first:] for ids, _ in encoded]
    batch, count = padded(prompts), len(labels)
    output = model(**vars(batch), use_cache=True, logits_to_keep=1, **force)
    names = [] if force else _chosen(model, output.routing_weights)
    if not force:
        force = {"routing_weights": output.routing_weights[:, -1].repeat_interleave(count, 0)}
    cache = output.past_key_values
    cache.batch_repeat_interleave(count)
    longest = max(map(len, endings))
    ids = torch.tensor([ending + [0] * (longest - len(ending)) for ending in endings])
    there = torch.tensor([[1] * len(ending) + [0] * (longest - len(ending)) for ending in endings])
    before = batch.attention_mask.repeat_interleave(count, 0)
    rest = model(
        input_ids=ids[:, :-1],
        attention_mask=torch.cat([before, there[:, :-1]], 1),
        position_ids=before.sum(1, keepdim=True) + torch.arange(longest - 1),
        past_key_values=cache,
        **force,
    ).logits
    logits = torch.cat([output.logits[:, -1:].repeat_interleave(count, 0), rest], 1).float()
    nats = -logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) * there
    lengths = [len(ending) for ending in endings]
    return nats.sum(1).view(-1, count), [lengths[i : i + count] for i in range(0, len(lengths), count)], names


def _chosen(model: Any, weights: Tensor) -> list[str]:
    """The expert with most weight on each row's last token; weights `[B, S or 1, E]`."""
    return [model.expert_names[i] for i in weights[:, -1].argmax(-1).tolist()]


def rouge_l(found: str, expected: str) -> float:
    """F1 of the longest common subsequence of lower-case words (ROUGE-L, Lin 2004), between 0 and 1."""
    a, b = found.lower().split(), expected.lower().split()
    if not a or not b:
        return 0.0
    lengths = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, start=1):
            before, lengths[j] = lengths[j], before + 1 if word == other else max(lengths[j], lengths[j - 1])
    return 2 * lengths[-1] / (len(a) + len(b))
