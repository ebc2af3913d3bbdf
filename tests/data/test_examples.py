"""Examples: their length, mixing, and the form TRL gets."""

from __future__ import annotations

import logging
import math
from collections import Counter
from copy import copy
from dataclasses import replace

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from dylora_moe.data.examples import (
    DataError,
    Example,
    apportion,
    as_row,
    domain_counts,
    encode,
    encode_prompt,
    fit_to_length,
    mix,
    reference,
    to_dataset,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word, per newline and per special token; words are learnt by nobody, so they share one id."""
    words = ["<unk>", "</s>", "<system>", "<user>", "<assistant>", "\n", *(f"w{i}" for i in range(20))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n| +"), "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<system>", "<user>", "<assistant>"]})
    made.chat_template = CHAT_TEMPLATE
    return made


def words(count):
    return " ".join(f"w{i % 20}" for i in range(count))


# Mixing


def domains(**sizes):
    return {name: [Example(f"{name}{i}", "c", name) for i in range(size)] for name, size in sizes.items()}


def test_proportional_mixing_uses_every_example_once_in_an_order_given_by_the_seed():
    data = domains(a=30, b=10)
    mixed = mix(data, "proportional", seed=1)
    assert Counter(mixed) == Counter(data["a"] + data["b"])
    assert mixed == mix(data, "proportional", seed=1) != mix(data, "proportional", seed=2)
    assert {example.domain for example in mixed[:20]} == {"a", "b"}


def test_equal_mixing_covers_every_domain_in_every_round():
    data = domains(a=10, b=4, c=1)
    mixed = mix(data, "equal", seed=1)
    assert mixed == mix(data, "equal", seed=1) != mix(data, "equal", seed=2)
    assert all({example.domain for example in mixed[i : i + 3]} == {"a", "b", "c"} for i in range(0, 30, 3))
    assert len({tuple(example.domain for example in mixed[i : i + 3]) for i in range(0, 30, 3)}) > 1
    times = Counter(example.prompt for example in mixed)
    assert [times[f"a{i}"] for i in range(10)] == [1] * 10
    assert sorted(times[f"b{i}"] for i in range(4)) == [2, 2, 3, 3]
    assert times["c0"] == 10


def test_mixing_does_not_depend_on_the_process():
    """The order written out: a change of it would change every training run."""
    assert [example.prompt for example in mix(domains(a=3, b=2), "equal", seed=0)] == [
        "b0",
        "a2",
        "a0",
        "b1",
        "a1",
        "b1",
    ]
    assert [example.prompt for example in mix(domains(a=3, b=2), "proportional", seed=0)] == [
        "b1",
        "a1",
        "b0",
        "a0",
        "a2",
    ]


def test_nothing_to_mix_is_refused():
    with pytest.raises(DataError, match="no examples to mix for b, c"):
        mix(domains(a=1, b=0, c=0))
    with pytest.raises(DataError, match="no examples to mix for any domain"):
        mix({})
    with pytest.raises(ValueError, match="mixing='even': choose proportional, equal or temperature"):
        mix(domains(a=1), "even")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"mixing=proportional leaves 'b' no example at weight=0\.1; raise it"):
        mix(domains(a=9, b=4), weights={"b": 0.1})
    with pytest.raises(DataError, match=r"mixing=temperature leaves 'b' no example at weight=0\.001"):
        mix(domains(a=99, b=1), "temperature", weights={"b": 0.001}, temperature=1)


def counted(mixed):
    return Counter(example.domain for example in mixed)


def test_apportion_is_the_largest_remainder():
    """Hamilton's method on a textbook's numbers, and on ties."""
    votes = {"a": 47000, "b": 16000, "c": 15900, "d": 12000, "e": 6000, "f": 3100}
    assert apportion(10, votes) == {"a": 5, "b": 2, "c": 1, "d": 1, "e": 1, "f": 0}
    assert apportion(2, {"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 0}
    assert apportion(100, {"a": 30.0, "b": 70.0}) == {"a": 30, "b": 70}


@pytest.mark.parametrize(
    ("sizes", "mixing", "weights", "temperature", "counts"),
    [
        ((30, 10), "proportional", (1, 1), 2, (30, 10)),
        ((30, 10), "proportional", (0.5, 2), 2, (15, 20)),
        ((10, 10), "proportional", (2.5, 0.33), 2, (25, 3)),
        ((30, 10, 7), "equal", (1, 1, 1), 2, (30, 30, 30)),
        ((30, 10), "equal", (2, 1), 2, (30, 15)),
        ((30, 10), "equal", (1, 4), 2, (30, 120)),
        ((10, 10), "equal", (0.1, 0.3), 2, (10, 30)),
        ((10, 7), "equal", (3, 2), 2, (11, 7)),  # 7 / (2/5) = 17.5, so 18 in all: 10.8 and 7.2
        ((90, 10), "temperature", (1, 1), 2, (75, 25)),  # √90 : √10 = 3 : 1
        ((90, 10), "temperature", (1, 9), 2, (50, 50)),
        ((90, 10), "temperature", (1, 1), 1, (90, 10)),
        ((90, 10), "temperature", (1, 1), math.inf, (50, 50)),
        ((64, 8, 1), "temperature", (1, 1, 1), 3, (42, 21, 10)),  # 4 : 2 : 1 of 73 is 41.7, 20.9, 10.4
    ],
)
def test_an_epoch_has_exact_shares(sizes, mixing, weights, temperature, counts):
    names = "abc"[: len(sizes)]
    sizes, weights, counts = (dict(zip(names, values, strict=True)) for values in (sizes, weights, counts))
    assert domain_counts(sizes, mixing, weights, temperature) == counts
    mixed = mix(domains(**sizes), mixing, 0, weights, temperature)
    assert counted(mixed) == counts
    for name in names:  # nobody comes again before everybody came: the times differ by one at most
        times = Counter(example.prompt for example in mixed if example.domain == name)
        assert max(times.values()) - min([times[f"{name}{i}"] for i in range(sizes[name])]) <= 1


def test_temperature_goes_through_a_domain_before_it_repeats():
    mixed = mix(domains(a=81, b=1, c=9), "temperature", seed=4)
    assert mixed == mix(domains(a=81, b=1, c=9), "temperature", seed=4)
    assert mixed != mix(domains(a=81, b=1, c=9), "temperature", seed=5)
    counts = counted(mixed)
    assert counts == {"a": 63, "c": 21, "b": 7}
    order = [example.prompt for example in mixed if example.domain == "c"]
    passes = [order[start : start + 9] for start in (0, 9)]
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]
    assert {example.domain for example in mixed[:20]} == {"a", "b", "c"}


def test_equal_mixing_spreads_unequal_weights():
    """Weights 2, 1, 1: every twelve consecutive examples hold 6, 3 and 3, give or take one round's shuffling."""
    mixed = mix(domains(a=40, b=20, c=20), "equal", seed=1, weights={"a": 2})
    assert counted(mixed) == {"a": 40, "b": 20, "c": 20}
    for start in range(0, len(mixed), 12):
        part = counted(mixed[start : start + 12])
        expected = {"a": 6, "b": 3, "c": 3} if start < 72 else {"a": 4, "b": 2, "c": 2}
        assert all(abs(part[name] - count) <= 1 for name, count in expected.items()), start


# The form TRL gets


CHAT = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
]


def test_rows_are_in_the_formats_of_trl():
    example = Example("p", "c", "sql", {"id": 1})
    assert as_row(example) == {"prompt": "p", "completion": "\nc", "domain": "sql"}
    assert as_row(replace(example, separator=" ")) == {"prompt": "p", "completion": " c", "domain": "sql"}
    reply = [{"role": "assistant", "content": "c"}]
    asked = [{"role": "user", "content": "p"}]
    assert as_row(example, chat=True) == {"prompt": asked, "completion": reply, "domain": "sql"}
    assert as_row(Example(CHAT, "c", "sql"), chat=True) == {"prompt": CHAT, "completion": reply, "domain": "sql"}
    for chat in (False, True):
        assert as_row(Example("", "c", "sql"), chat) == {"text": "c", "domain": "sql"}


def test_messages_without_a_chat_template_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"^sql: chat messages need a chat template; set base\.chat: true"):
        encode(Example(CHAT, "c", "sql"), tokenizer)


def test_encode_counts_prompt_and_end_token(tokenizer):
    ids, prompt = encode(Example("w1 w2 w3", "w4 w5"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["w1", "w2", "w3", "\n", "w4", "w5", "</s>"]
    assert prompt == 3
    ids, prompt = encode(Example("w1", "w4 w5"), tokenizer, chat=True)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", "w1", "</s>", "<assistant>", "w4", "w5", "</s>"]
    assert prompt == 4
    ids, prompt = encode(Example(CHAT, "w5"), tokenizer, chat=True)
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == (
        "<system> w9 </s> <user> w1 w2 </s> <assistant> w3 </s> <user> w4 </s> <assistant> w5 </s>"
    )
    assert prompt == 14
    for chat in (False, True):
        ids, prompt = encode(Example("", "w4 w5"), tokenizer, chat)
        assert tokenizer.convert_ids_to_tokens(ids) == ["w4", "w5", "</s>"]
        assert prompt == 0


def test_prompts_to_answer_are_what_encode_puts_before_the_completion(tokenizer):
    for example, chat in (
        (Example(words(3), "w1"), False),
        (Example(words(3), "w1"), True),
        (Example(CHAT, "w1"), True),
    ):
        ids, prompt = encode(example, tokenizer, chat)
        assert encode_prompt(example, tokenizer, chat) == ids[:prompt]
    assert encode_prompt(Example("", "w1"), tokenizer) == [tokenizer.eos_token_id]


def test_dataset_is_tokenised_and_labelled(tokenizer):
    examples = [Example("w1", "w2", "a"), Example("", "w3 w4", "b")]
    ids = [encode(example, tokenizer)[0] for example in examples]
    assert to_dataset(examples, tokenizer).to_list() == [
        {"input_ids": ids[0], "labels": [-100, *ids[0][1:]], "domain": "a"},
        {"input_ids": ids[1], "labels": ids[1], "domain": "b"},
    ]
    whole = to_dataset(examples, tokenizer, completion_only=False)
    assert whole["labels"][:] == whole["input_ids"][:] == ids


def test_dataset_encodes_a_repeated_example_once(tokenizer, monkeypatch):
    example, calls = Example("w1", "w2", "a"), []
    monkeypatch.setattr("dylora_moe.data.examples.encode", lambda *_: (calls.append(1), ([1, 2], 1))[1])
    assert to_dataset([example] * 3, tokenizer)["input_ids"][:] == [[1, 2]] * 3
    assert len(calls) == 1


MIXED_SEPARATORS = [
    Example(words(3), words(2), "a"),
    Example(words(5), "w7", "b", separator=" "),
    Example(words(2), "w7", "b", separator=""),
    Example(words(2), "w7 </s>", "b"),
]


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize(
    ("examples", "chat"),
    [
        (MIXED_SEPARATORS, False),
        (MIXED_SEPARATORS[:3], True),
        ([Example(CHAT, "w5", "a"), Example(CHAT[:2], words(3), "b")], True),
        ([Example("", words(4), "a"), Example("", "w5 </s>", "b")], False),
    ],
    ids=["plain", "chat", "messages", "text"],
)
def test_dataset_is_what_trl_makes_of_the_rows(tokenizer, examples, chat, completion_only, tmp_path):
    def prepared(dataset):
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        options = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
        if "text" not in dataset.column_names:
            options["completion_only_loss"] = completion_only
        trainer = SFTTrainer(
            LlamaForCausalLM(config),
            args=SFTConfig(str(tmp_path), **options),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]

    theirs = prepared(Dataset.from_list([as_row(example, chat) for example in examples]))
    ours = to_dataset(examples, tokenizer, chat, completion_only)
    assert [(row["input_ids"], row["labels"]) for row in ours] == theirs == prepared(ours)


# Length


def test_examples_that_fit_come_back_as_they_are(tokenizer):
    examples = [Example(words(3), words(2)), Example(words(4), words(3))]  # 7 and 9 tokens
    assert fit_to_length(examples, tokenizer, 9) == examples


def test_too_long_examples_are_an_error_with_the_remedy(tokenizer):
    examples = [Example(words(n), "w1") for n in (2, 8, 12)]  # 5, 11 and 15 tokens
    message = (
        r"^sql: 2 of 3 examples exceed 10 tokens \(the longest has 15\)\. "
        r"Raise train\.max_length .* or set train\.too_long to drop .* or truncate"
    )
    with pytest.raises(DataError, match=message):
        fit_to_length(examples, tokenizer, 10, what="sql")


def test_drop_and_truncate_say_how_many(tokenizer, caplog):
    examples = [Example(words(2), "w1"), Example(words(7), words(5)), Example(words(12), "w1")]
    with caplog.at_level(logging.WARNING, "dylora_moe.data.examples"):
        assert fit_to_length(examples, tokenizer, 10, "drop") == examples[:1]
        assert "2 of 3 examples exceed 10 tokens (the longest has 15); dropped." in caplog.messages[-1]
        assert fit_to_length(examples, tokenizer, 10, "truncate") == examples[:2]
        assert "the end is cut off, and 1 are dropped because the prompt alone is that long" in caplog.messages[-1]


def test_chats_that_the_template_cannot_take_are_data_errors(tokenizer):
    strict = copy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match="refuses a conversation of system, user, assistant, user: roles must alternate"
    ):
        encode(Example(CHAT, "w1"), strict, chat=True)
    strict.chat_template = None
    with pytest.raises(
        DataError, match=r"no chat template; name one with base\.chat_template: FILE\.jinja, .* set base\.chat: false"
    ):
        encode(Example("w1", "w1"), strict, chat=True)


def test_nothing_left_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"1 of 1 examples exceed 4 tokens .* nothing is left"):
        fit_to_length([Example(words(9), "w1")], tokenizer, 4, "drop")
    with pytest.raises(ValueError, match="too_long='cut': choose error, drop or truncate"):
        fit_to_length([Example(words(9), "w1")], tokenizer, 4, "cut")  # type: ignore[arg-type]


def test_the_chat_template_counts(tokenizer):
    example = Example(words(3), words(2))  # 7 tokens plain, 9 in the template
    assert fit_to_length([example], tokenizer, 7) == [example]
    with pytest.raises(DataError, match="the longest has 9"):
        fit_to_length([example], tokenizer, 7, chat=True)


# Keys of messages, in the template and passed over


TOOL_TEMPLATE = (
    "{% for t in tools or [] %}<system> {{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<{{ m.role }}> {{ m.name or '' }} {{ m.content }} "
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments.to }} {% endfor %}</s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CALLING = {
    "role": "assistant",
    "content": "w1",
    "tool_calls": [{"function": {"name": "w2", "arguments": {"to": "w3"}}}],
}
TOOLS = [{"type": "function", "function": {"name": "w8"}}]


def test_calls_names_and_tools_are_learnt_as_the_template_writes_them(tokenizer):
    reading = copy(tokenizer)
    reading.chat_template = TOOL_TEMPLATE
    example = Example([{"role": "user", "content": "w5", "name": "w6"}], CALLING, template={"tools": TOOLS})
    ids, prompt = encode(example, reading, chat=True)
    text = "<system> w8 <user> w6 w5 </s> <assistant> w1 w2 w3 </s>"
    assert " ".join(reading.convert_ids_to_tokens(ids)) == text
    assert encode_prompt(example, reading, chat=True) == ids[:prompt]
    assert reading.convert_ids_to_tokens(ids[prompt:]) == ["w1", "w2", "w3", "</s>"]
    assert reference(example, reading, chat=True) == "w1 w2 w3"


@pytest.mark.parametrize(
    ("prompt", "completion", "template", "message"),
    [
        (
            {"content": "w5"},
            CALLING,
            {},
            r"^line 7, message 2: the base's chat template passes over 'tool_calls'; leave",
        ),
        ({"content": "w5", "name": "w6"}, "w1", {}, r"^line 7, message 1: .* passes over 'name'"),
        ({"content": "w5"}, "w1", {"tools": TOOLS}, r"^line 7, the base's chat template passes over 'tools'"),
        (
            {"content": "w5"},
            {"role": "assistant", "content": "w1", "reasoning_content": "w2"},
            {},
            r"^line 7, message 2: .* passes over 'reasoning_content'; .* base\.chat_template: FILE\.jinja",
        ),
    ],
)
def test_a_template_that_passes_over_what_is_to_be_learnt_is_refused(tokenizer, prompt, completion, template, message):
    example = Example([{"role": "user", **prompt}], completion, template=template, place="line 7")
    with pytest.raises(DataError, match=message):
        encode(example, tokenizer, chat=True)


# Tokenizers that append the end-of-sequence token


@pytest.fixture(scope="module")
def ending(tokenizer):
    """Begins every text with `<system>` and ends it with `</s>`, as T5's, Gemma's or Llama's can be told to."""
    made = copy(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<system> $A </s>", special_tokens=[("<system>", 2), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ), made


def test_prompts_carry_no_end_and_texts_end_once_whatever_the_tokenizer_appends(ending):
    ending, plain = ending
    start = ending.convert_tokens_to_ids("<system>")
    for example in (
        Example("w1 w2", "w3"),
        Example("w1", "w3 </s>"),
        Example("", "w3 w4"),
        Example("", "w3 </s> </s>"),
    ):
        ids, prompt = encode(example, ending)
        expected, without = encode(example, plain)
        while expected[-2] == plain.eos_token_id:
            expected.pop()
        assert ids == [start, *expected]
        assert ids.count(ending.eos_token_id) == 1
        if example.prompt:
            assert prompt == without + 1
            assert encode_prompt(example, ending) == ids[:prompt]
    assert encode_prompt(Example("", "w1"), ending) == [start]


def test_a_text_is_not_shortened_where_begin_and_end_share_a_token(tokenizer):
    """OPT's tokenizer begins a text with `</s>`, and ends none."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    opt = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    assert encode_prompt(Example("w1", "w2"), opt) == [1, *tokenizer("w1").input_ids]
    assert encode_prompt(Example("", "w2"), opt) == [1]
    assert encode(Example("", "w2"), opt)[0] == [1, *tokenizer("w2").input_ids, 1]
