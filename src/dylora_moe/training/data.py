"""Examples: reading them, checking their length, mixing domains, handing them to TRL."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .skills import generate

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from .recipe import DataRecipe

logger = logging.getLogger(__name__)

Split = Literal["train", "test"]


class DataError(ValueError):
    """Data that cannot be used; the message names the file and line, and the remedy."""


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn.

    Args:
        prompt: what the user says.
        completion: what the model should say, without an end-of-sequence token.
        domain: the expert whose data this is.
        extra: whatever else the file gave for it; never seen by the model.
    """

    prompt: str
    completion: str
    domain: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)


def read_jsonl(path: str | Path, domain: str = "", limit: int | None = None) -> list[Example]:
    """The examples of a JSONL file: one object with `prompt` and `completion` per line, blank lines skipped.

    Args:
        path: the file, UTF-8.
        domain: the expert whose data it is.
        limit: stop after so many examples; later lines are not looked at.

    Raises:
        DataError: no such file, a broken line, a missing, empty or non-text prompt or completion, or no
            examples at all; the message names the file and line.
    """
    path = Path(path)
    examples: list[Example] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if limit is not None and len(examples) == limit:
                    break
                if line.strip():
                    examples.append(_parse_line(line, f"{path}, line {number}", domain))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    if not examples:
        raise DataError(f"{path}: no examples; expected one JSON object with 'prompt' and 'completion' per line.")
    return examples


def load_examples(
    domain: str, data: DataRecipe, split: Split, seed: int = 0, limit: int | None = None
) -> list[Example]:
    """The examples of one expert: generated, or read from its file.

    Args:
        domain: the expert's name.
        data: where its data comes from.
        split: `train` or `test`.
        seed: decides which instances of a generated skill are drawn.
        limit: at most so many, on top of the limit in `data`.

    Raises:
        DataError: as `read_jsonl`, or `data` names no test file.
    """
    source = data.train if split == "train" else data.test
    limits = [n for n in (limit, data.limit if split == "train" else data.test_limit) if n is not None]
    if data.skill is not None:
        assert isinstance(source, int)
        rows = generate(data.skill, split, min([source, *limits]), seed)
        return [Example(row["prompt"], row["completion"], domain) for row in rows]
    if source is None:
        raise DataError(f"experts.{domain}.data has no {split} file; add `{split}: FILE.jsonl`.")
    return read_jsonl(str(source), domain, min(limits, default=None))


def mix(
    domains: Mapping[str, Sequence[Example]],
    mixing: Literal["proportional", "equal"] = "proportional",
    seed: int = 0,
) -> list[Example]:
    """One list of the examples of several domains.

    Args:
        domains: the examples of each domain.
        mixing: `proportional` shuffles all examples, each once. `equal` takes as many from every domain as the
            largest has, going through smaller ones again in a fresh order, and lays them out in rounds of one
            example per domain, each round shuffled: any E consecutive examples of a round cover all E domains.
        seed: decides the order; the same seed gives the same list on every machine.

    Raises:
        DataError: a domain without examples.
    """
    empty = [name for name, examples in domains.items() if not examples]
    if empty or not domains:
        raise DataError(f"no examples to mix for {', '.join(empty) or 'any domain'}.")
    rng = random.Random(f"mix/{mixing}/{seed}")
    if mixing == "proportional":
        everything = [example for examples in domains.values() for example in examples]
        rng.shuffle(everything)
        return everything
    if mixing != "equal":
        raise ValueError(f"mixing={mixing!r}: choose proportional or equal.")
    longest = max(len(examples) for examples in domains.values())
    columns = [_repeat(examples, longest, rng) for examples in domains.values()]
    mixed: list[Example] = []
    for row in zip(*columns, strict=True):
        mixed.extend(rng.sample(row, len(row)))
    return mixed


def as_row(example: Example, chat: bool = False, separator: str = "\n") -> dict[str, Any]:
    """The example in TRL's prompt/completion format, with its domain.

    Args:
        example: the example.
        chat: as messages, for the tokenizer's chat template; else as plain text.
        separator: what the completion of the plain form begins with, so that the model itself ends the prompt.
    """
    if chat:
        prompt: Any = [{"role": "user", "content": example.prompt}]
        completion: Any = [{"role": "assistant", "content": example.completion}]
    else:
        prompt, completion = example.prompt, separator + example.completion
    return {"prompt": prompt, "completion": completion, "domain": example.domain}


def to_dataset(examples: Iterable[Example], chat: bool = False, separator: str = "\n") -> Dataset:
    """A `datasets.Dataset` with the columns `prompt`, `completion` and `domain`, as `as_row` makes them."""
    from datasets import Dataset

    return Dataset.from_list([as_row(example, chat, separator) for example in examples])


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, chat: bool = False, separator: str = "\n"
) -> tuple[list[int], int]:
    """The token ids TRL trains on and how many of them are the prompt.

    Returns:
        the ids of prompt and completion, closed by the end-of-sequence token (plain) or the chat template;
        the number of leading ids that belong to the prompt and get no loss.
    """
    row = as_row(example, chat, separator)
    if chat:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        prompt_ids, ids = (tokenizer(str(part), add_special_tokens=False).input_ids for part in (prompt, text))
    else:
        prompt_ids = tokenizer(row["prompt"]).input_ids
        ids = tokenizer(row["prompt"] + row["completion"] + (tokenizer.eos_token or "")).input_ids
    shared = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
    return ids, min(shared, len(ids))


def fit_to_length(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: Literal["error", "drop", "truncate"] = "error",
    chat: bool = False,
    separator: str = "\n",
    what: str = "the training data",
) -> list[Example]:
    """The examples that can be trained on within `max_length` tokens, prompt and completion together.

    Args:
        examples: the examples to check.
        tokenizer: of the base.
        max_length: in tokens.
        too_long: `error` refuses longer examples; `drop` leaves them out; `truncate` keeps them, for TRL to cut
            the end off, except those whose prompt alone fills `max_length`. Both log how many.
        chat: whether prompts go through the chat template.
        separator: see `as_row`.
        what: what to call the examples in a message.

    Raises:
        DataError: an example is too long (`error`), or none is left.
    """
    lengths = [encode(example, tokenizer, chat, separator) for example in examples]
    long = [len(ids) > max_length for ids, _ in lengths]
    if not any(long):
        return list(examples)
    longest = max(len(ids) for ids, _ in lengths)
    found = f"{what}: {sum(long)} of {len(examples)} examples exceed {max_length} tokens (the longest has {longest})"
    if too_long == "error":
        raise DataError(
            f"{found}. Raise train.max_length (up to the base's context), "
            "or set train.too_long to drop (leave them out) or truncate (cut their end off)."
        )
    if too_long == "drop":
        kept = [example for example, is_long in zip(examples, long, strict=True) if not is_long]
        logger.warning("%s; dropped.", found)
    elif too_long == "truncate":
        kept = [example for example, (_, prompt) in zip(examples, lengths, strict=True) if prompt < max_length]
        logger.warning(
            "%s; the end is cut off, and %d are dropped because the prompt alone is that long.",
            found,
            len(examples) - len(kept),
        )
    else:
        raise ValueError(f"too_long={too_long!r}: choose error, drop or truncate.")
    if not kept:
        raise DataError(f"{found}, so nothing is left. Raise train.max_length.")
    return kept


def _parse_line(line: bytes, place: str, domain: str) -> Example:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg}, column {error.colno}).") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object with 'prompt' and 'completion', got {type(value).__name__}.")
    for key in ("prompt", "completion"):
        if key not in value:
            raise DataError(f"{place}: no {key!r}. Its keys: {', '.join(sorted(value)) or 'none'}.")
        if not isinstance(value[key], str):
            raise DataError(f"{place}: {key!r} must be text, got {value[key]!r}.")
        if not value[key].strip():
            raise DataError(f"{place}: empty {key!r}; there is nothing to {'learn' if key == 'completion' else 'ask'}.")
    extra = {key: item for key, item in value.items() if key not in ("prompt", "completion")}
    return Example(value["prompt"], value["completion"], domain, extra)


def _repeat(examples: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` examples: whole passes over `examples`, each in a fresh order, the last one cut."""
    repeated: list[Example] = []
    while len(repeated) < count:
        repeated.extend(rng.sample(examples, len(examples)))
    return repeated[:count]
