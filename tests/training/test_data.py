"""Reading examples, their length, mixing, and the form TRL gets."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from dylora_moe.training.data import (
    DataError,
    Example,
    as_row,
    encode,
    encode_prompt,
    fit_to_length,
    load_examples,
    mix,
    read_jsonl,
    to_dataset,
)
from dylora_moe.training.recipe import DataRecipe
from dylora_moe.training.skills import generate

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


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def words(count):
    return " ".join(f"w{i % 20}" for i in range(count))


# Reading


def test_extra_keys_are_kept_aside_and_blank_lines_skipped(tmp_path):
    file = write(
        tmp_path / "d.jsonl", {"prompt": "p", "completion": "c", "id": 7}, "", {"prompt": "q", "completion": "d"}
    )
    examples = read_jsonl(file, domain="sql")
    assert examples == [Example("p", "c", "sql"), Example("q", "d", "sql")]
    assert [example.extra for example in examples] == [{"id": 7}, {}]


def test_unicode_and_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"prompt": "é", "completion": "日"}\n'.encode())
    assert read_jsonl(tmp_path / "d.jsonl") == [Example("é", "日")]


def test_limit_stops_before_the_lines_after_it(tmp_path):
    file = write(tmp_path / "d.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(3)), "{broken")
    assert [example.prompt for example in read_jsonl(file, limit=2)] == ["p0", "p1"]
    assert len(read_jsonl(file, limit=3)) == 3
    with pytest.raises(DataError, match="line 4"):
        read_jsonl(file, limit=4)


GOOD = '{"prompt": "p", "completion": "c"}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{'prompt': 1}"], r"d\.jsonl, line 2: not valid JSON \(Expecting property name.*column 2\)"),
        ([GOOD, "", '{"prompt": "p", "completion": "c"'], r"d\.jsonl, line 3: not valid JSON"),
        (['["p", "c"]'], r"line 1: expected an object with 'prompt' and 'completion', got list"),
        ([GOOD, '{"prompt": "p", "answer": "c"}'], r"line 2: no 'completion'\. Its keys: answer, prompt"),
        (['{"promt": "p", "completion": "c"}'], r"line 1: no 'prompt'\. Its keys: completion, promt"),
        (["{}"], r"line 1: no 'prompt'\. Its keys: none"),
        ([GOOD, '{"prompt": "p", "completion": 4}'], r"line 2: 'completion' must be text, got 4"),
        ([GOOD, '{"prompt": "p", "completion": null}'], r"line 2: 'completion' must be text, got None"),
        ([GOOD, '{"prompt": "p", "completion": " \\n"}'], r"line 2: empty 'completion'; there is nothing to learn"),
        (['{"prompt": "", "completion": "c"}'], r"line 1: empty 'prompt'; there is nothing to ask"),
        ([""], r"d\.jsonl: no examples; expected one JSON object"),
    ],
)
def test_unusable_lines_are_named(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_jsonl(write(tmp_path / "d.jsonl", *lines))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read: No such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        read_jsonl(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "\xe9"}')
    with pytest.raises(DataError, match=r"latin\.jsonl, line 2: not UTF-8 text \(.*at byte 12\)"):
        read_jsonl(tmp_path / "latin.jsonl")


def test_examples_of_an_expert_come_from_its_skill_or_file(tmp_path):
    skill = DataRecipe(skill="date", train=5, test=4)
    rows = generate("date", "train", 5, seed=3)
    assert load_examples("when", skill, "train", seed=3) == [
        Example(row["prompt"], row["completion"], "when") for row in rows
    ]
    assert len(load_examples("when", skill, "test")) == 4
    assert len(load_examples("when", skill, "test", limit=2)) == 2

    file = str(write(tmp_path / "d.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(9))))
    data = DataRecipe(train=file, test=file, limit=4, test_limit=3)
    assert [example.prompt for example in load_examples("a", data, "train")] == ["p0", "p1", "p2", "p3"]
    assert len(load_examples("a", data, "test")) == 3
    assert len(load_examples("a", data, "test", limit=2)) == 2
    assert len(load_examples("a", data, "test", limit=8)) == 3


def test_a_missing_test_file_names_the_expert(tmp_path):
    file = str(write(tmp_path / "d.jsonl", GOOD))
    with pytest.raises(DataError, match=r"experts\.law\.data has no test file; add `test: FILE\.jsonl`"):
        load_examples("law", DataRecipe(train=file), "test")


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
    with pytest.raises(ValueError, match="mixing='even': choose proportional or equal"):
        mix(domains(a=1), "even")  # type: ignore[arg-type]


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
    monkeypatch.setattr("dylora_moe.training.data.encode", lambda *_: (calls.append(1), ([1, 2], 1))[1])
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
    with caplog.at_level(logging.WARNING, "dylora_moe.training.data"):
        assert fit_to_length(examples, tokenizer, 10, "drop") == examples[:1]
        assert "2 of 3 examples exceed 10 tokens (the longest has 15); dropped." in caplog.messages[-1]
        assert fit_to_length(examples, tokenizer, 10, "truncate") == examples[:2]
        assert "the end is cut off, and 1 are dropped because the prompt alone is that long" in caplog.messages[-1]


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
