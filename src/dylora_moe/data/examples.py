"""Examples: their tokens, checking their length, mixing domains, handing them to TRL."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Mixing = Literal["proportional", "equal", "temperature"]
TooLong = Literal["error", "drop", "truncate"]
MIXING_TEMPERATURE = 2.0


Message = dict[str, Any]
"""One message of a chat: `role`, `content` and whatever else the chat template reads, such as `tool_calls`."""
_MUST_BE_READ = ("tool_calls", "name")
"""Keys of a message that a chat template must not pass over."""
_MUST_BE_LEARNT = (*_MUST_BE_READ, "reasoning_content", "reasoning", "thinking")
"""Likewise of a message that is to be learnt."""


class DataError(ValueError):
    """Data that cannot be used; the message names the place and the remedy."""


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn.

    Args:
        prompt: what the user says: text, or chat messages that end before the reply. Empty for plain text, all of which
            is learnt.
        completion: what the model should say, without an end-of-sequence token: text, or the assistant's message where
            it is more than that (`tool_calls`).
        domain: the expert whose data this is.
        extra: whatever else the file gave for it; never seen by the model.
        separator: what the completion begins with where no chat template is used, so that the model itself ends the
            prompt; plain text has none.
        template: what the chat template gets beside the messages: `tools`, and the row's `chat_template_kwargs`.
        place: where it stands, for messages.
    """

    prompt: str | list[Message]
    completion: str | Message
    domain: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    separator: str = "\n"
    template: dict[str, Any] = field(default_factory=dict, hash=False)
    place: str = field(default="", compare=False)

    @property
    def form(self) -> Literal["messages", "prompt", "text"]:
        """What the prompt is: messages, text, or nothing before plain text."""
        return "messages" if isinstance(self.prompt, list) else "prompt" if self.prompt else "text"

    @property
    def question(self) -> str:
        """The prompt's text; of messages the last one's, of plain text the first words."""
        if isinstance(self.prompt, list):
            return self.prompt[-1]["content"]
        return self.prompt or " ".join(str(self.completion).split()[:8])


def fingerprint(examples: Iterable[Example]) -> str:
    """How many examples these are, and a hash of what the model sees of them, in their order."""
    rows = [(e.prompt, e.completion, e.separator, *([e.template] if e.template else [])) for e in examples]
    text = json.dumps(rows, sort_keys=True, default=str)
    return f"{len(rows)} examples, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def mix(
    domains: Mapping[str, Sequence[Example]],
    mixing: Mixing = "proportional",
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    temperature: float = MIXING_TEMPERATURE,
) -> list[Example]:
    """One list of the examples of several domains: an epoch.

    How many of each domain it has is `domain_counts`' rule. `proportional` shuffles them all together; a domain with
    weight w has every example floor(w) times and a random choice of them once more. `temperature` shuffles the
    domains; `equal` spreads them evenly over rounds of E examples (E domains) and shuffles each round, so that with
    equal weights every round covers all domains. Both go through a domain in a fresh order each time: no example comes
    again before all of its domain were used.

    Args:
        domains: the examples of each domain.
        mixing: the rule.
        seed: decides the order; the same seed gives the same list on every machine.
        weights: of the domains, greater than 0; 1 where none is given.
        temperature: of `temperature`, 1 or more.

    Raises:
        DataError: a domain without examples, or one whose weight leaves it none.
    """
    empty = [name for name, examples in domains.items() if not examples]
    if empty or not domains:
        raise DataError(f"no examples to mix for {', '.join(empty) or 'any domain'}.")
    sizes = {name: len(examples) for name, examples in domains.items()}
    counts = domain_counts(sizes, mixing, weights, temperature)
    rng = random.Random(f"mix/{mixing}/{seed}")
    if mixing == "proportional":
        everything = [example for name in domains for example in _times(domains[name], counts[name], rng)]
        rng.shuffle(everything)
        return everything
    passes = {name: iter(_repeat(domains[name], counts[name], rng)) for name in domains}
    if mixing == "temperature":
        names = [name for name in domains for _ in range(counts[name])]
        rng.shuffle(names)
        return [next(passes[name]) for name in names]
    places = sorted(
        ((2 * i + 1) / (2 * counts[name]), at, name) for at, name in enumerate(domains) for i in range(counts[name])
    )
    spread = [next(passes[name]) for _, _, name in places]
    rounds = [spread[start : start + len(domains)] for start in range(0, len(spread), len(domains))]
    return [example for examples in rounds for example in rng.sample(examples, len(examples))]


def domain_counts(
    sizes: Mapping[str, int],
    mixing: Mixing,
    weights: Mapping[str, float] | None = None,
    temperature: float = MIXING_TEMPERATURE,
) -> dict[str, int]:
    """How many examples of each domain an epoch has, for n_i examples and weight w_i of domain i.

    - `proportional`: n_i·w_i, rounded.
    - `equal`: the share w_i / Σw of the shortest epoch in which every domain is used up at least once; with equal
      weights as many of each as the largest has.
    - `temperature`: the share (n_i·w_i)^(1/T) / Σ_j (n_j·w_j)^(1/T) of Σn examples; T = 1 is proportional, T → ∞ equal.

    Shares are made whole by the largest remainder (`apportion`).

    Args:
        sizes: n, at least 1 each.
        mixing: the rule.
        weights: w, greater than 0; 1 where none is given.
        temperature: T, 1 or more.

    Raises:
        DataError: a domain is left without examples.
    """
    weight = {name: Fraction(str((weights or {}).get(name, 1))) for name in sizes}
    if mixing == "proportional":
        counts = {name: round(size * weight[name]) for name, size in sizes.items()}
    elif mixing == "equal":
        total = sum(weight.values())
        counts = apportion(math.ceil(max(size * total / weight[name] for name, size in sizes.items())), weight)
    elif mixing == "temperature":
        powers = {name: (size * float(weight[name])) ** (1 / temperature) for name, size in sizes.items()}
        counts = apportion(sum(sizes.values()), powers)
    else:
        raise ValueError(f"mixing={mixing!r}: choose proportional, equal or temperature.")
    for name, count in counts.items():
        if not count:
            raise DataError(f"mixing={mixing} leaves {name!r} no example at weight={float(weight[name])}; raise it.")
    return counts


def apportion(total: int, shares: Mapping[str, float | Fraction]) -> dict[str, int]:
    """`total` divided in whole numbers by the largest remainder, ties to the first.

    Args:
        total: what to divide.
        shares: greater than 0, of any sum.
    """
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def as_row(example: Example, chat: bool = False) -> dict[str, Any]:
    """The example in TRL's prompt/completion or text format, with its domain.

    Args:
        example: the example.
        chat: as messages, for the tokenizer's chat template; else as plain text.

    Raises:
        DataError: the prompt is messages and `chat` is off.
    """
    if example.form == "text":
        return {"text": example.completion, "domain": example.domain}
    if not chat:
        if isinstance(example.prompt, list) or isinstance(example.completion, dict):
            raise DataError(f"{example.domain or 'the data'}: chat messages need a chat template; set base.chat: true.")
        completion = example.separator + example.completion
        return {"prompt": example.prompt, "completion": completion, "domain": example.domain}
    prompt = example.prompt if isinstance(example.prompt, list) else [{"role": "user", "content": example.prompt}]
    reply = example.completion
    reply = reply if isinstance(reply, dict) else {"role": "assistant", "content": reply}
    return {"prompt": prompt, "completion": [reply], "domain": example.domain, **example.template}


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
        the ids of prompt and completion, closed by one end-of-sequence token (plain) or the chat template;
        the number of leading ids that belong to the prompt and get no loss, 0 for plain text.

    Raises:
        DataError: there is no chat template, it refuses the messages, or it passes over what is to be learnt.
    """
    row = as_row(example, chat)
    if "text" in row:
        return _ended(tokenizer, row["text"]), 0
    prompt_ids = encode_prompt(example, tokenizer, chat)
    if isinstance(row["completion"], str):
        ids = _ended(tokenizer, row["prompt"] + row["completion"])
    else:
        messages = row["prompt"] + row["completion"]
        ids = _rendered(tokenizer, messages, example)
        _check_read(tokenizer, messages, example, len(row["prompt"]))
    shared = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
    return ids, min(shared, len(ids))


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> list[int]:
    """The token ids to generate an answer from; for plain text what stands before a text, at least one token.

    They are what `encode` puts before the completion: no end-of-sequence token follows, whatever the tokenizer appends
    to a text.
    """
    prompt = as_row(example, chat).get("prompt", "")
    if not isinstance(prompt, str):
        return _rendered(tokenizer, prompt, example, add_generation_prompt=True)
    end: Any = tokenizer.eos_token_id
    return _opened(tokenizer, prompt) or [end]


def reference(example: Example, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> str:
    """The text that a right answer to the example decodes to, stripped."""
    if isinstance(example.completion, str):
        return example.completion.strip()
    ids, prompt = encode(example, tokenizer, chat)
    return str(tokenizer.decode(ids[prompt:], skip_special_tokens=True)).strip()


def fit_to_length(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: TooLong = "error",
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


def _opened(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that goes on: what the tokenizer puts before texts, but not the end that some append."""
    ids: Any = tokenizer(text).input_ids
    probe: Any = tokenizer("a").input_ids  # of an empty text the last token can be the one that begins texts
    return ids[:-1] if ids and probe[-1] == tokenizer.eos_token_id else ids


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a whole text, closed by one end-of-sequence token, whether or not text or tokenizer end it."""
    end: Any = tokenizer.eos_token_id
    ids = _opened(tokenizer, text)
    if end is None:
        return ids
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return [*ids, end]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], example: Example, add_generation_prompt: bool = False
) -> list[int]:
    """The ids of messages in the chat template."""
    if tokenizer.chat_template is None:
        raise DataError(
            "the base's tokenizer has no chat template; name one with base.chat_template: FILE.jinja, take an instruct "
            "base, or give text prompts and set base.chat: false."
        )
    further = {"tools": example.template.get("tools"), **example.template.get("chat_template_kwargs", {})}
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True, **further
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{_where(example)}the base's chat template refuses a conversation of {roles}: {error}"
        ) from error
    return encoded["input_ids"]


def _check_read(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], example: Example, first_learnt: int
) -> None:
    """Raise a `DataError` for the first key to be learnt that the chat template passes over."""
    whole: list[int] | None = None
    for number, message in enumerate(messages):
        for key in _MUST_BE_LEARNT if number >= first_learnt else _MUST_BE_READ:
            if key not in message or (key == "name" and message["role"] == "tool"):
                continue
            rest = {name: value for name, value in message.items() if name != key}
            without = [*messages[:number], rest, *messages[number + 1 :]]
            whole = whole or _rendered(tokenizer, messages, example)
            if _rendered(tokenizer, without, example) == whole:
                raise DataError(
                    f"{_where(example)}message {number + 1}: the base's chat template passes over {key!r}; leave it "
                    "out, or name a template that reads it with base.chat_template: FILE.jinja."
                )
    if example.template.get("tools"):
        bare = replace(example, template={**example.template, "tools": None})
        if _rendered(tokenizer, messages, bare) == (whole or _rendered(tokenizer, messages, example)):
            raise DataError(
                f"{_where(example)}the base's chat template passes over 'tools'; leave them out, or name a template "
                "that reads them with base.chat_template: FILE.jinja."
            )


def _where(example: Example) -> str:
    return f"{example.place}, " if example.place else ""


def _times(examples: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` examples: all of them as often as goes, and a random choice of the rest."""
    times, rest = divmod(count, len(examples))
    return [*examples] * times + rng.sample(examples, rest)


def _repeat(examples: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` examples: whole passes over `examples`, each in a fresh order, the last one cut."""
    repeated: list[Example] = []
    while len(repeated) < count:
        repeated.extend(rng.sample(examples, len(examples)))
    return repeated[:count]
