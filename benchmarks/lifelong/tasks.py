"""The tasks of continual learning, in the orders that papers learn them in, and rows that fit a small budget."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dylora_moe.data.examples import Example, encode

ORDERS: dict[str, tuple[tuple[str, ...], ...]] = {
    # O-LoRA's orders 4 to 6 (arXiv 2310.14152), which are Progressive Prompts' 8 to 10, without yahoo.
    "long": (
        (
            *("mnli", "cb", "wic", "copa", "qqp", "boolqa", "rte"),
            *("imdb", "yelp", "amazon", "sst2", "dbpedia", "agnews", "multirc"),
        ),
        (
            *("multirc", "boolqa", "wic", "mnli", "cb", "copa", "qqp"),
            *("rte", "imdb", "sst2", "dbpedia", "agnews", "yelp", "amazon"),
        ),
        (
            *("yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte"),
            *("imdb", "sst2", "dbpedia", "agnews", "multirc", "boolqa", "wic"),
        ),
    ),
    # SAPT's first order (arXiv 2401.08295), and the second one of GainLoRA's scripts.
    "superni": (
        (
            "task1572_samsum_summary",
            "task363_sst2_polarity_classification",
            "task1290_xsum_summarization",
            "task181_outcome_extraction",
            "task002_quoref_answer_generation",
            "task1510_evalution_relation_extraction",
            "task639_multi_woz_user_utterance_generation",
            "task1729_personachat_generate_next",
            "task073_commonsenseqa_answer_generation",
            "task1590_diplomacy_text_generation",
            "task748_glucose_reverse_cause_event_detection",
            "task511_reddit_tifu_long_text_summarization",
            "task591_sciq_answer_generation",
            "task1687_sentiment140_classification",
            "task875_emotion_classification",
        ),
        (
            "task748_glucose_reverse_cause_event_detection",
            "task073_commonsenseqa_answer_generation",
            "task875_emotion_classification",
            "task002_quoref_answer_generation",
            "task1687_sentiment140_classification",
            "task591_sciq_answer_generation",
            "task363_sst2_polarity_classification",
            "task1572_samsum_summary",
            "task511_reddit_tifu_long_text_summarization",
            "task1290_xsum_summarization",
            "task639_multi_woz_user_utterance_generation",
            "task1510_evalution_relation_extraction",
            "task181_outcome_extraction",
            "task1729_personachat_generate_next",
            "task1590_diplomacy_text_generation",
        ),
    ),
    # Made up below: two with labels, one to write.
    "small": (("letters", "digits", "echo"), ("echo", "digits", "letters")),
}
FOLDERS = {"long": "cl_long", "superni": "cl_superni"}
MOST_LABELS = 20
SPARE = 40
"""Training rows beyond those learnt, to choose learning rates by."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: also of its expert.
        train: the rows to learn.
        spare: further training rows.
        test: held-out rows.
        labels: every completion of the training rows, where there are at most twenty; else empty, an answer is written.
    """

    name: str
    train: list[Example]
    spare: list[Example]
    test: list[Example]
    labels: tuple[str, ...]


def read_tasks(
    suite: str,
    order: int,
    folder: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    held_out: int,
    max_length: int,
    seed: int,
) -> list[Task]:
    """The tasks of a suite in one of its orders (from 1); `seed` draws the training rows, the held-out ones stay.

    Raises:
        ValueError: an order that the suite does not have, or no folder for a suite that is not made up.
    """
    orders = ORDERS[suite]
    if not 1 <= order <= len(orders):
        raise ValueError(f"--order {order}: the suite {suite} has {len(orders)}.")
    if folder is None and suite in FOLDERS:
        raise ValueError(f"--suite {suite} is read from --data FOLDER/{FOLDERS[suite]}; give the folder.")
    tasks = []
    for name in orders[order - 1]:
        files = {}
        for part in ("train", "test"):
            if folder is None or suite not in FOLDERS:
                files[part] = _made_up(name, part)
            else:
                with (folder / FOLDERS[suite] / name / f"{part}.jsonl").open(encoding="utf-8") as lines:
                    files[part] = [json.loads(line) for line in lines]
        labels = sorted({row["completion"] for row in files["train"]})
        drawn = random.Random(f"train {seed} {name}").sample(files["train"], len(files["train"]))
        kept = random.Random(f"test {name}").sample(files["test"], min(held_out, len(files["test"])))
        train, spare, test = (
            [_within(row, name, tokenizer, max_length) for row in part]
            for part in (drawn[:rows], drawn[rows : rows + SPARE], kept)
        )
        tasks.append(Task(name, train, spare, test, tuple(labels) if len(labels) <= MOST_LABELS else ()))
    return tasks


def _within(row: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """A row whose prompt has lost its middle where it is longer than about `max_length` tokens: instructions and
    labels stand at its start, the question often at its end."""
    example = Example(row["prompt"], row["completion"], domain=name)
    ids, prompt = encode(example, tokenizer)
    if len(ids) <= max_length:
        return example
    kept = max(max_length - (len(ids) - prompt) - 1, 2)
    head, tail = ids[: kept // 2], ids[prompt - (kept - kept // 2) : prompt]
    return Example(f"{tokenizer.decode(head)}…{tokenizer.decode(tail)}", row["completion"], domain=name)


def batches(rows: Sequence[Example], steps: int, size: int, seed: str) -> list[list[Example]]:
    """`steps` batches of `size`: whole passes over the rows, each in a fresh order.

    Within eight batches' worth of a pass, rows of like length lie together, so that little is padded.
    """
    drawn, order = random.Random(seed), []
    while len(order) < steps * size:
        order += drawn.sample(rows, len(rows))
    result = []
    for start in range(0, steps * size, 8 * size):
        near = sorted(order[start : min(start + 8 * size, steps * size)], key=lambda e: len(e.prompt))
        made = [near[i : i + size] for i in range(0, len(near), size)]
        result += drawn.sample(made, len(made))
    return result


def _made_up(name: str, part: str) -> list[dict[str, str]]:
    """Rows of the suite `small`: which of two letters comes first, whether a digit is even, what was said."""
    drawn = random.Random(f"{name} {part}")
    rows = []
    for _ in range(64):
        if name == "letters":
            word = "".join(drawn.choice("ab") for _ in range(drawn.randint(4, 9)))
            rows.append({"prompt": f"First letter of {word}?", "completion": word[0]})
        elif name == "digits":
            number = drawn.randint(100, 9999)
            rows.append({"prompt": f"{number}: odd or even", "completion": "odd" if number % 2 else "even"})
        else:
            word = "".join(drawn.choice("WXYZ") for _ in range(drawn.randint(3, 5)))
            rows.append({"prompt": f"SAY {word}", "completion": word})
    return rows
