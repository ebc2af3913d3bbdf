"""Texts become the ids that training would see, and a note says how they did."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig

from dylora_moe.data.examples import Example, encode
from dylora_moe.skills.reading import Reading, digest_of, read_rows
from tinybase import tiny_base, tiny_tokenizer
from topics import mixture

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_rows_are_read_as_training_reads_them():
    tokenizer = tiny_tokenizer()
    example = Example("two", "three", separator=" = ")
    found = read_rows(["one", {"prompt": "two", "completion": "three"}, example], tokenizer, separator=": ")
    expected = [Example("", "one"), Example("two", "three", separator=": "), example]
    assert [(list(row.ids), row.prompt) for row in found] == [encode(each, tokenizer) for each in expected]
    assert tokenizer.decode(list(found[1].ids)) == "two: three<|end|>"
    assert [row.prompt for row in found] == [0, 3, 3]


def test_chats_go_through_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    row = read_rows([{"prompt": "two", "completion": "three"}], tokenizer, chat=True)[0]
    assert tokenizer.decode(list(row.ids)) == "<user>two<assistant>three"
    assert tokenizer.decode(list(row.ids[: row.prompt])) == "<user>two<assistant>"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows were given"),
        ("one text", "a list of texts"),
        ({"prompt": "a", "completion": "b"}, "a list of texts"),
        (["fine", ""], "row 2 is empty"),
        ([" \n"], "row 1 is empty"),
        ([{"prompt": "a", "completion": ""}], "row 1 is empty"),
        ([{"prompt": "a"}], "row 1 is {'prompt': 'a'}; expected a text, or"),
        ([3], "row 1 is 3; expected"),
        ([{"prompt": 3, "completion": "b"}], "row 1: 'prompt' is 3; expected text"),
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], "row 1 is made of chat messages"),
    ],
)
def test_what_is_no_text_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        read_rows(rows, tiny_tokenizer())


def test_a_digest_depends_on_rows_and_order():
    rows = read_rows(["one", "two"], tiny_tokenizer())
    assert digest_of(rows) == digest_of(list(rows))
    assert digest_of(rows) != digest_of(rows[::-1])


def test_the_note_is_that_of_the_bare_base():
    """Experts do not show, and padding does not change a tokenizer."""
    tokenizer = tiny_tokenizer()
    bare = Reading.of(tiny_base(), 1, tokenizer)
    tokenizer(["a", "bcd"], padding=True)
    assert Reading.of(mixture().get_base_model(), 1, tokenizer) == bare
    assert (bare.dtype, bare.quantization, bare.width, bare.separator) == ("float32", "", 32, "\n")


def test_the_note_tells_what_differs():
    tokenizer, base = tiny_tokenizer(), tiny_base()
    known = Reading.of(base, 1, tokenizer)
    other = tiny_tokenizer()
    other.add_tokens(["xyz"])
    assert [text.split()[0] for text in known.differences(Reading.of(base, 1, other))] == ["tokenizer"]
    assert [text.split()[0] for text in known.differences(Reading.of(base, 2, tokenizer, ": "))] == [
        "layer",
        "separator",
    ]
    other.chat_template = CHAT
    assert Reading.of(base, 1, other, chat=True).chat_template
    base.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    assert "load_in_4bit" in Reading.of(base, 1, tokenizer).quantization
    with torch.no_grad():
        base.lm_head.weight[0, 0] += 1
    assert Reading.of(base, 1, tokenizer).base != known.base
    assert Reading.of(base.bfloat16(), 1, tokenizer).dtype == "bfloat16"


def test_other_weights_are_known_where_the_dtype_is_the_same():
    base = tiny_base()
    known = Reading.of(base, 1, tiny_tokenizer())
    assert not known.has_other_weights(mixture().get_base_model())
    with torch.no_grad():
        base.lm_head.weight[0, 0] += 1
    assert known.has_other_weights(base)
    assert not known.has_other_weights(tiny_base().bfloat16())
    assert not known.has_other_weights(tiny_base().to("meta"))
    base.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    assert not known.has_other_weights(base)
