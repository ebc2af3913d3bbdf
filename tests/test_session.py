"""A session: which pass predicted which token, whose pieces join to the text, and what its prompts look like."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dylora_moe import CheckpointError, DyLoraMoE, MoELoraConfig
from dylora_moe.checkpoint import files
from dylora_moe.routing.granularity import GRANULARITIES
from dylora_moe.session import Session, pieces
from tinybase import save_tiny_base, tiny_tokenizer

PROMPT = "Käse?"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def saved(base, tmp_path):
    """Save a mixture of two experts whose router prefers now one, now the other; the folder."""

    def save(chat: bool | None = None, **changes) -> str:
        config = MoELoraConfig(expert_names=["sql", "date"], r=4, init_lora_weights=False, top_k=1, **changes)
        config.target_modules = {"q_proj", "v_proj"}
        torch.manual_seed(3)
        model = DyLoraMoE.from_base(base, config)
        model.router.up.data.mul_(30)
        model.chat = chat
        model.save_pretrained(tmp_path / "mixture")
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        tokenizer.save_pretrained(tmp_path / "mixture")
        return str(tmp_path / "mixture")

    return save


def test_each_token_is_shown_with_the_pass_that_predicted_it(saved):
    session = Session(saved())
    answer = session.answer(PROMPT, max_new_tokens=6)
    ids = session.tokenizer("".join(answer.tokens), return_tensors="pt").input_ids
    assert answer.prompt_length == len(session.tokenizer(PROMPT).input_ids)
    prompt = session.tokenizer(PROMPT, return_tensors="pt").input_ids
    ids = session.model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert len(answer.tokens) == ids.shape[1] == len(answer.weights)  # the last generated token included
    with torch.no_grad():
        read = session.model(ids).routing_weights[0]  # row t is the pass that read token t and predicted t + 1
    assert answer.weights[0].isnan().all()
    torch.testing.assert_close(answer.weights[1:], read[:-1], rtol=0, atol=1e-5)
    assert not torch.equal(read[1:], read[:-1])  # or the rows would not tell which pass is which


def test_a_mixture_of_the_hub_is_read_with_its_own_tokenizer(saved, monkeypatch):
    folder = saved()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xyz"])
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(files, "snapshot_download", lambda *args, **options: folder)
    assert len(Session("me/mixture").tokenizer) == len(tokenizer)


def test_a_checkpoint_on_the_hub_has_its_own_tokenizer(saved, monkeypatch):
    folder = saved()
    monkeypatch.setattr(files, "snapshot_download", lambda _, allow_patterns: folder * ("*.jinja" in allow_patterns))
    assert Session("me/skills").tokenizer.chat_template == Session(folder).tokenizer.chat_template is not None


def test_routing_a_text_is_the_same_pairing(saved):
    session = Session(saved())
    answer = session.route(PROMPT)
    with torch.no_grad():
        read = session.model(session.tokenizer(PROMPT, return_tensors="pt").input_ids).routing_weights[0]
    assert answer.weights[0].isnan().all()
    assert torch.equal(answer.weights[1:], read[:-1])
    assert "".join(answer.tokens) == PROMPT


def test_a_base_whose_settings_ask_for_beams_is_read_as_one_row(saved):
    session = Session(saved())
    session.model.generation_config.num_beams = 3
    session.model.generation_config.use_cache = False
    answer = session.answer(PROMPT, max_new_tokens=4)
    assert len(answer.tokens) == len(answer.weights) == answer.prompt_length + 4


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens alone lose the space before a word, and with bytes for what it does not know."""
    words = ["<unk>", "▁Once", "▁upon", "▁a", "▁time", "▁", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["Once upon a time!", "Once é upon", "a 🧀", ""])
@pytest.mark.parametrize("tokenizer", [sentencepiece(), tiny_tokenizer()], ids=["sentencepiece", "bytes"])
def test_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer(text).input_ids
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids) == text


def test_a_word_keeps_its_space():
    tokenizer = sentencepiece()
    assert pieces(tokenizer, tokenizer("Once upon a time!").input_ids) == ["Once", " upon", " a", " time", "!"]


def test_whether_prompts_are_chats_is_in_the_checkpoint(saved, tmp_path):
    folder = saved(chat=True)
    assert json.loads((tmp_path / "mixture" / "moe_config.json").read_text())["chat"] is True
    (tmp_path / "mixture" / "recipe.yaml").write_text("base: {chat: false}")  # of another run: not asked
    session = Session(folder)
    assert session.chat is True
    assert "".join(session.route("x").tokens) == "[user]x"
    session.model.save_pretrained(tmp_path / "again")
    assert DyLoraMoE.from_pretrained(str(tmp_path / "again")).chat is True


@pytest.mark.parametrize(
    ("recipe", "chat"), [("base: {chat: true}", True), ("base:", False), ("[]", False), (None, False)]
)
def test_older_checkpoints_are_read_with_the_recipe_beside_them(saved, tmp_path, recipe, chat):
    folder = saved()
    assert "chat" not in json.loads((tmp_path / "mixture" / "moe_config.json").read_text())
    if recipe is not None:
        (tmp_path / "mixture" / "recipe.yaml").write_text(recipe)
    assert Session(folder).chat is chat


def test_damaged_words_about_chats_are_named(saved, tmp_path):
    folder = saved()
    (tmp_path / "mixture" / "recipe.yaml").write_text("base: {chat: [")
    with pytest.raises(CheckpointError, match=r"recipe.yaml cannot be read, which tells whether prompts are chats"):
        Session(folder)
    file = tmp_path / "mixture" / "moe_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat": "yes"}))
    with pytest.raises(CheckpointError, match="chat is 'yes'; expected true or false"):
        Session(folder)


@pytest.mark.parametrize(("granularity", "expert"), [("token", "sql"), ("token", "base"), ("sequence", None)])
def test_folding_gives_the_same_answer(saved, granularity, expert):
    session = Session(saved(granularity=granularity))
    plain = session.complete(PROMPT, expert, max_new_tokens=5)
    assert session.complete(PROMPT, expert, max_new_tokens=5, fold=True) == plain
    assert session.answer(PROMPT, expert, max_new_tokens=5, fold=True).text == plain


def test_folding_says_when_it_does_not_apply(saved):
    with pytest.raises(
        ValueError, match=r"fold does not apply: .* routes every token by itself. Force one .*sql, date"
    ):
        Session(saved()).complete(PROMPT, fold=True)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_has_gradients(saved, granularity):
    session = Session(saved(granularity=granularity))
    session.backward(PROMPT)
    found = [part.tensor.grad for name in session.model.expert_names for part in session.model.expert_tensors(name)]
    assert any(gradient is not None and bool(gradient.any()) for gradient in found)
