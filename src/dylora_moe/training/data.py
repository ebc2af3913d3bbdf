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
        prompt: what the user says: text, or chat messages (`role` and `content`) that end before the reply. Empty for
            plain text, all of which is learnt.
        completion: what the model should say, without an end-of-sequence token.
        domain: the expert whose data this is.
        extra: whatever else the file gave for it; never seen by the model.
        separator: what the completion begins with where no chat template is used, so that the model itself ends the
            prompt; plain text has none.
    """

    prompt: str | list[dict[str, str]]
    completion: str
    domain: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    separator: str = "\n"

    @property
    def question(self) -> str:
        """The prompt's text; of messages the last one's, of plain text the first words."""
        if isinstance(self.prompt, list):
            return self.prompt[-1]["content"]
        return self.prompt or " ".join(self.completion.split()[:8])


def read_jsonl(path: str | Path, domain: str = "", limit: int | None = None, separator: str = "\n") -> list[Example]:
    """The examples of a JSONL file: one object with `prompt` and `completion` per line, blank lines skipped.

    Args:
        path: the file, UTF-8.
        domain: the expert whose data it is.
        limit: stop after so many examples; later lines are not looked at.
        separator: of the examples.

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
                    examples.append(_parse_line(line, f"{path}, line {number}", domain, separator))
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
        return [Example(row["prompt"], row["completion"], domain, separator=data.separator) for row in rows]
    if source is None:
        raise DataError(f"experts.{domain}.data has no {split} file; add `{split}: FILE.jsonl`.")
    return read_jsonl(str(source), domain, min(limits, default=None), data.separator)


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


def as_row(example: Example, chat: bool = False) -> dict[str, Any]:
    """The example in TRL's prompt/completion or text format, with its domain.

    Args:
        example: the example.
        chat: as messages, for the tokenizer's chat template; else as plain text.

    Raises:
        DataError: the prompt is messages and `chat` is off.
    """
    if example.prompt == "":
        return {"text": example.completion, "domain": example.domain}
    if not chat:
        if isinstance(example.prompt, list):
            raise DataError(f"{example.domain or 'the data'}: chat messages need a chat template; set base.chat: true.")
        completion = example.separator + example.completion
        return {"prompt": example.prompt, "completion": completion, "domain": example.domain}
    prompt = example.prompt if isinstance(example.prompt, list) else [{"role": "user", "content": example.prompt}]
    completion = [{"role": "assistant", "content": example.completion}]
    return {"prompt": prompt, "completion": completion, "domain": example.domain}


def to_dataset(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    chat: bool = False,
    completion_only: bool = True,
) -> Dataset:
    """A tokenised `datasets.Dataset`, which SFTTrainer takes as it is.

    Args:
        examples: the examples, in order.
        tokenizer: of the base.
        chat: whether prompts go through the chat template.
        completion_only: whether only the completion is learnt, or the prompt as well.

    Returns:
        the columns `input_ids`, `labels` (-100 where there is no loss) and `domain` (a name).
    """
    from datasets import Dataset

    rows: dict[int, dict[str, Any]] = {}  # mixing repeats examples; each is encoded once
    examples = list(examples)
    for example in examples:
        if id(example) not in rows:
            ids, prompt = encode(example, tokenizer, chat)
            labels = [-100] * prompt + ids[prompt:] if completion_only else ids
            rows[id(example)] = {"input_ids": ids, "labels": labels, "domain": example.domain}
    return Dataset.from_list([rows[id(example)] for example in examples])


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> tuple[list[int], int]:
    """The token ids TRL would train on and how many of them are the prompt.

    Returns:
        the ids of prompt and completion, closed by the end-of-sequence token (plain) or the chat template;
        the number of leading ids that belong to the prompt and get no loss, 0 for plain text.
    """
    row = as_row(example, chat)
    if "text" in row:
        return _tokenise(tokenizer, _ended(row["text"], tokenizer)), 0
    prompt_ids = _tokenise(tokenizer, row["prompt"], add_generation_prompt=True)
    completion: Any = row["completion"]
    if isinstance(completion, str):
        completion = _ended(completion, tokenizer)
    ids = _tokenise(tokenizer, row["prompt"] + completion)
    shared = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
    return ids, min(shared, len(ids))


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> list[int]:
    """The token ids to generate an answer from; for plain text what stands before a text, at least one token."""
    ids = _tokenise(tokenizer, as_row(example, chat).get("prompt", ""), add_generation_prompt=True)
    end: Any = tokenizer.eos_token_id
    return ids or [end]


def fit_to_length(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: Literal["error", "drop", "truncate"] = "error",
    chat: bool = False,
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
        what: what to call the examples in a message.

    Raises:
        DataError: an example is too long (`error`), or none is left.
    """
    lengths = [encode(example, tokenizer, chat) for example in examples]
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


def _parse_line(line: bytes, place: str, domain: str, separator: str) -> Example:
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
    return Example(value["prompt"], value["completion"], domain, extra, separator)


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: Any, add_generation_prompt: bool = False) -> list[int]:
    """The ids of a text, or of messages in the chat template."""
    if isinstance(text, str):
        return tokenizer(text).input_ids
    encoded: Any = tokenizer.apply_chat_template(
        text, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    return encoded["input_ids"]


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = str(tokenizer.eos_token or "")
    return text if text.endswith(end) else text + end


def _repeat(examples: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` examples: whole passes over `examples`, each in a fresh order, the last one cut."""
    repeated: list[Example] = []
    while len(repeated) < count:
        repeated.extend(rng.sample(examples, len(examples)))
    return repeated[:count]
