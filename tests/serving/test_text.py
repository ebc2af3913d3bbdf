"""The bytes of tokens, and a text that grows by whole characters."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dylora_moe.serving.request import Token
from dylora_moe.serving.text import TextStream, TokenBytes
from tinybase import tiny_tokenizer


def token(content: bytes) -> Token:
    return Token(0, content, (1.0,), ("only",), "only")


def grown(pieces: list[bytes], stops: tuple[str, ...] = (), past_blanks: bool = False) -> tuple[list[str], list[bytes]]:
    """The texts that come with each piece and at the end, and the bytes of the tokens beside each."""
    stream, texts, tokens = TextStream(stops, past_blanks), [], []
    for piece in pieces:
        text, out, stopped = stream.add(token(piece))
        texts.append(text)
        tokens.append(b"|".join(each.bytes for each in out))
        if stopped:
            return texts, tokens
    text, out = stream.rest()
    return [*texts, text], [*tokens, b"|".join(each.bytes for each in out)]


def test_bytes_of_a_byte_level_tokenizer():
    tokenizer = tiny_tokenizer()
    read = TokenBytes(tokenizer)
    text = "Grüße, 世界 🙂\n"
    ids = tokenizer(text)["input_ids"]
    assert [read(id) for id in ids] == [bytes([byte]) for byte in text.encode()]
    assert read(tokenizer.eos_token_id) == b""
    assert read(5000) == b""


def sentencepiece_like() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "▁": 1, "▁hi": 2, "<0xF0>": 3, "<0x9F>": 4, "a": 5, "<b>": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    wrapped.add_tokens(["<b>"])
    return wrapped


def test_bytes_of_a_sentencepiece_tokenizer():
    read = TokenBytes(sentencepiece_like())
    assert [read(id) for id in range(7)] == [b"", b" ", b" hi", b"\xf0", b"\x9f", b"a", b"<b>"]


def test_bytes_of_another_tokenizer_are_those_of_its_text():
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    read = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))
    assert read(1) == b"play"


def test_a_tokenizer_without_a_backend_is_refused():
    with pytest.raises(ValueError, match="object has no fast form"):
        TokenBytes(object())


def test_characters_come_when_they_are_whole_and_their_tokens_with_them():
    euro = "€".encode()
    texts, tokens = grown([b"a", euro[:1], euro[1:2], euro[2:] + b"b", b"c"])
    assert texts == ["a", "", "", "€b", "c", ""]
    assert tokens == [b"a", b"", b"", b"|".join([euro[:1], euro[1:2], euro[2:] + b"b"]), b"c", b""]


def test_bytes_that_are_no_character_are_left_out_of_the_text_alone():
    texts, tokens = grown([b"a", b"\xff", b"\xe2", b"b", b"\xe2"])
    assert "".join(texts) == "ab"
    assert b"|".join(filter(None, tokens)) == b"a|\xff|\xe2|b|\xe2"


def test_a_token_without_text_comes_at_once():
    assert grown([b"a", b"", b"b"])[1] == [b"a", b"", b"b", b""]
    stream = TextStream(())
    assert stream.add(token(b""))[1] == (token(b""),)


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        ([b"on", b"e, t", b"wo"], (", two",), "one"),
        ([b"one"], ("one",), ""),
        ([b"aab", b"aac"], ("aac",), "aab"),
        ([b"one, ", b"three"], (", two",), "one, three"),
        ([b"x\n", b"\ny"], ("\n\n", "y"), "x"),
        ([b"xayb"], ("b", "ay"), "x"),
        ([b"one, t"], (", two",), "one, t"),
    ],
)
def test_stop_strings(pieces, stops, text):
    assert "".join(grown(pieces, stops)[0]) == text


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([b"\n", b"one", b"\n", b"two"], "\none"),
        ([b" \none\n", b"two"], " \none"),
        ([b"\n", b"\n\n"], "\n\n\n"),
        ([b"\n", b"o", b" ", b"n"], "\no n"),
    ],
)
def test_stop_strings_past_the_white_space_before_a_text(pieces, text):
    assert "".join(grown(pieces, ("\n", " two"), past_blanks=True)[0]) == text
    assert "".join(grown(pieces, ("\n",))[0]) == ("" if pieces[0][:1] == b"\n" else " ")


def test_what_may_begin_a_stop_string_is_held_back():
    texts, tokens = grown([b"one,", b" t", b"en"], (", two",))
    assert texts == ["one", "", ", ten", ""]
    assert tokens == [b"", b"", b"one,| t|en", b""]


def test_tokens_behind_a_stop_string_are_dropped():
    assert grown([b"ab", b"cd", b"ef"], ("bc",))[1] == [b"", b"ab"]
    assert grown([b"ab", b"cd"], ("cd",))[1] == [b"ab", b""]
