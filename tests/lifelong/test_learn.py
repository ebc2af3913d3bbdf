"""Learning a skill: what is decided of rows, that nothing old changes, that whatever stops it changes nothing."""

from __future__ import annotations

import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe import model as module_of_model
from dylora_moe.data.examples import Example
from dylora_moe.lifelong import learn as module
from dylora_moe.lifelong.learn import Training, learn, moved
from dylora_moe.lifelong.look import look
from dylora_moe.skills.novelty import KNOWN, NEW, RELATED, TOO_SHORT, Novelty
from dylora_moe.training.trainer.interrupted import Interrupted
from dylora_moe.training.trainer.trainer import MoETrainer
from tinybase import tiny_base, tiny_tokenizer
from topics import NAMES, mixture, teach, texts

OLD, SHORT = NAMES[:3], Training(steps=2, batch_size=2)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def model() -> DyLoraMoE:
    return teach(mixture(OLD))


def judge(monkeypatch, *answers: str) -> None:
    """Have the rows be these, over and over; known ones are sql."""

    def novelty(self, rows, batch=False, **how):
        found = [Novelty(answers[n % len(answers)], "sql", 0.5, 0.0) for n in range(len(rows))]
        return found[0] if batch else found

    monkeypatch.setattr(DyLoraMoE, "novelty", novelty)


def everything(model: DyLoraMoE) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def forced(model: DyLoraMoE, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 7]]), experts=name).logits


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def rows(count: int = 12) -> list:
    return texts(NAMES.index("code"), count)


def test_a_new_skill_is_learnt_and_nothing_old_changes(model, monkeypatch):
    judge(monkeypatch, NEW)
    model.freeze_expert("law")
    before, outputs = everything(model), {name: forced(model, name) for name in OLD}
    found = learn(model, rows(), "code", tiny_tokenizer(), training=SHORT, source="a file")
    assert (found.name, found.rows) == ("code", 12)
    assert model.expert_names == [*OLD, "code"]
    assert model.expert_states["code"] == "routed"
    assert model.skills["code"].rows == 12
    assert [teaching.source for teaching in model.skills["code"].taught] == ["a file"]
    assert not model.training
    assert model.frozen_experts == {"law"}
    assert not any(parameter.requires_grad for parameter in model.router.parameters())
    after = everything(model)
    changed = [key for key, tensor in before.items() if not torch.equal(tensor, after[key])]
    assert all(key.startswith("router.") for key in changed)
    assert all(torch.equal(forced(model, name), outputs[name]) for name in OLD)
    trained = [part.tensor for part in model.expert_tensors("code") if "lora_B" in part.name]
    assert all(bool(tensor.any()) for tensor in trained)


def test_the_router_is_the_one_of_having_been_taught_at_once(model, monkeypatch):
    judge(monkeypatch, NEW)
    learn(model, rows(), "code", tiny_tokenizer(), training=SHORT)
    other = teach(mixture((*OLD, "code")), *OLD)
    other.teach("code", rows(), tiny_tokenizer())
    for key, tensor in other.router.state_dict().items():
        assert torch.allclose(model.router.state_dict()[key], tensor, rtol=1e-6, atol=1e-6), key


def test_rows_are_read_once(model, monkeypatch):
    judge(monkeypatch, NEW)
    read, states_of = [], module_of_model.states_of
    monkeypatch.setattr(module_of_model, "states_of", lambda *args: (read.append(args[3].key), states_of(*args))[1])
    learn(model, rows(), "code", tiny_tokenizer(), training=SHORT)
    assert len(read) == len(set(read)) == 12


def test_rows_of_known_skills_are_left_out(model, monkeypatch):
    judge(monkeypatch, KNOWN, NEW, RELATED, TOO_SHORT)
    found = learn(model, rows(16), "code", tiny_tokenizer(), training=SHORT)
    assert found.look.known == {"sql": 4}
    assert found.rows == 12
    assert list(found.look.new) == [e for n, e in enumerate(found.look.examples) if n % 4]
    assert found.look.counts == {"known: sql": 4, "new": 4, "related: sql": 4, "too short to say": 4}


@pytest.mark.parametrize(
    ("answers", "count", "reason"),
    [
        ((KNOWN,), 12, "nothing new: the rows are of sql (12 rows)"),
        ((KNOWN, KNOWN, NEW), 12, "nothing new: the rows are of sql (8 rows); 4 rows of no skill are too few"),
        ((NEW,), 1, "1 row make no skill: 8 are needed"),
    ],
)
def test_nothing_is_learnt_of_known_or_too_few_rows(model, monkeypatch, answers, count, reason):
    judge(monkeypatch, *answers)
    before = everything(model)
    found = learn(model, rows(count), "code", tiny_tokenizer(), training=SHORT)
    assert found.name is None
    assert found.look.reason is not None
    assert found.look.reason.startswith(reason)
    assert model.expert_names == list(OLD)
    assert same(before, everything(model))


def test_everything_is_learnt_where_asked(model, monkeypatch):
    judge(monkeypatch, KNOWN)
    found = model.learn(rows(), "code", tokenizer=tiny_tokenizer(), everything=True, training=SHORT)
    assert (found.name, found.rows) == ("code", 12)


def test_a_name_is_found_where_none_is_given(model, monkeypatch):
    judge(monkeypatch, NEW)
    model.add_expert("skill_1")
    assert learn(model, rows(), None, tiny_tokenizer(), training=SHORT).name == "skill_2"


@pytest.mark.parametrize(
    ("step", "error"),
    [("add_expert", OSError), ("_train", KeyboardInterrupt), ("teach", RuntimeError), ("moved", KeyboardInterrupt)],
)
def test_whatever_stops_it_leaves_the_mixture_as_it_was(model, monkeypatch, step, error):
    judge(monkeypatch, NEW)
    place = module if step in ("_train", "moved") else DyLoraMoE
    original = getattr(place, step)

    def stops(*args, **kwargs):
        original(*args, **kwargs)
        raise error("no more")

    monkeypatch.setattr(place, step, stops)
    before, skills = everything(model), model.skills
    with pytest.raises(error, match="no more"):
        learn(model, rows(), "code", tiny_tokenizer(), training=SHORT)
    assert model.expert_names == list(OLD)
    assert same(before, everything(model))
    assert model.skills is skills
    assert not model.training
    assert model.frozen_experts == set()


@pytest.mark.parametrize("step", ["_train", "moved"])
def test_whatever_stops_it_in_a_mixture_that_knows_nothing_leaves_it_as_it_was(monkeypatch, step):
    model = mixture(OLD)

    def stops(*args, **kwargs):
        raise KeyboardInterrupt("no more")

    monkeypatch.setattr(module, step, stops)
    monkeypatch.setattr(module, "_train", stops if step == "_train" else lambda *args: None)
    with pytest.raises(KeyboardInterrupt, match="no more"):
        learn(model, rows(), "code", tiny_tokenizer(), training=SHORT)
    assert model.expert_states == dict.fromkeys(OLD, "new")
    assert not model.skills


@pytest.mark.parametrize("kept", [False, True])
def test_ctrl_c_says_what_is_kept(model, monkeypatch, tmp_path, kept):
    judge(monkeypatch, NEW)
    original = MoETrainer.training_step

    def step(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MoETrainer, "training_step", step)
    before, folder = everything(model), tmp_path / "work"
    with pytest.raises(Interrupted, match=r"^stopped by SIGINT; the mixture is as it was, and") as stopped:
        learn(model, rows(), "code", tiny_tokenizer(), training=replace(SHORT, folder=folder if kept else None))
    said = str(stopped.value)
    assert stopped.value.exit_code == 130
    assert same(before, everything(model))
    if kept:
        assert f"the same call goes on from the checkpoints in {next(folder.iterdir())}." in said
    else:
        assert "the training is lost. With Training(folder=...) the same call would go on" in said


def test_torch_s_random_numbers_go_on_as_if_nothing_had_been(model, monkeypatch):
    judge(monkeypatch, NEW)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    learn(model, rows(), "code", tiny_tokenizer(), training=SHORT)
    assert torch.equal(torch.rand(2), expected)


def test_a_training_that_was_cut_off_goes_on(model, monkeypatch, tmp_path):
    judge(monkeypatch, NEW)
    training = Training(steps=4, batch_size=2, folder=tmp_path / "work")
    learn(model, rows(), "code", tiny_tokenizer(), training=training)
    whole = {part.name: part.tensor.clone() for part in model.expert_tensors("code")}
    (last,) = tmp_path.glob("work/code-*/checkpoint-4")
    shutil.rmtree(last)
    other = teach(mixture(OLD))
    learn(other, rows(), "code", tiny_tokenizer(), training=training)
    assert len(list((tmp_path / "work").iterdir())) == 1
    assert all(torch.equal(part.tensor, whole[part.name]) for part in other.expert_tensors("code"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("law", {}, "expert 'law' exists already"),
        ("base", {}, "expert name 'base' is reserved"),
        ("a b", {}, "use a letter, then letters"),
    ],
)
def test_a_name_that_cannot_be_is_refused(model, name, settings, message):
    with pytest.raises(ValueError, match=message):
        learn(model, rows(), name, tiny_tokenizer(), training=SHORT)


def test_a_router_that_is_trained_cannot_take_in_a_skill():
    config = MoELoraConfig(expert_names=["sql"], target_modules=["q_proj"], router_layer=1)
    with pytest.raises(ValueError, match="the router is of the type 'mlp', which is trained"):
        learn(DyLoraMoE(tiny_base(), config), rows(), "code", tiny_tokenizer())


@pytest.mark.parametrize("values", [{"steps": 0}, {"batch_size": 0}, {"max_length": 1}, {"learning_rate": -1.0}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Training(**values)


def test_no_rows_are_refused(model):
    with pytest.raises(ValueError, match="no rows were given"):
        look(model, [], tiny_tokenizer())


def test_rows_that_are_there_twice_count_once(model, monkeypatch):
    judge(monkeypatch, NEW)
    given = rows(6)
    seen = look(model, [*given, *given[:4]], tiny_tokenizer())
    assert len(seen.examples) == 6
    assert seen.twice == 4


def test_rows_with_other_tools_are_other_rows(model, monkeypatch):
    judge(monkeypatch, NEW)
    row = Example("which?", "this one")
    seen = look(model, [row, row, replace(row, template={"tools": ["search"]})], tiny_tokenizer())
    assert seen.twice == 1
    assert [example.template for example in seen.examples] == [{}, {"tools": ["search"]}]


def test_plain_texts_are_learnt_with_the_separator_of_the_others(monkeypatch):
    judge(monkeypatch, NEW)
    model = teach(mixture(OLD), separator=" ")
    monkeypatch.setattr(module, "_train", lambda *args: None)
    learn(model, [text for text in rows(30) if isinstance(text, str)], "code", tiny_tokenizer(), training=SHORT)
    assert model.skills["code"].rows == 10


def test_no_row_is_longer_than_the_bases_context(model, monkeypatch):
    judge(monkeypatch, NEW)  # the base has 256 positions
    seen = look(model, ["hij" * 100, {"prompt": "hij" * 100, "completion": "h"}], tiny_tokenizer(), max_length=1024)
    assert [len(str(example.completion)) for example in seen.examples] == [254, 46]
    assert seen.too_long == 1


def test_a_long_document_is_read_in_pieces_and_a_long_row_is_left_out(model, monkeypatch):
    judge(monkeypatch, NEW)
    tokenizer, text = tiny_tokenizer(), "hiijü" * 80  # ü is two tokens
    seen = look(model, [text, {"prompt": text, "completion": "h"}, "hij"], tokenizer, max_length=64)
    assert seen.too_long == 1
    assert "".join(str(example.completion) for example in seen.examples) == text + "hij"
    assert all(len(tokenizer(str(example.completion)).input_ids) < 64 for example in seen.examples)
    with pytest.raises(ValueError, match="none of the 1 row fits into max_length=64 tokens"):
        look(model, [{"prompt": text, "completion": "h"}], tokenizer, max_length=64)


def test_to_a_mixture_that_knows_nothing_everything_is_new():
    model = mixture(OLD)
    found = learn(model, rows(), "code", tiny_tokenizer(), training=SHORT)
    assert found.name == "code"
    assert found.look.whole == Novelty(NEW, "", 0.0, math.inf)
    assert found.moved == {}


def test_moved_counts_kept_rows_that_go_elsewhere(model):
    before = model.skills
    assert moved(before, before) == dict.fromkeys(OLD, (0, 6))
    twin = mixture((*OLD, "twin"))
    teach(twin, *OLD)
    twin.teach("twin", texts(NAMES.index("law"), 6, seed=0), tiny_tokenizer())  # what is law is as much twin
    changed = moved(before, twin.skills)
    assert changed["sql"] == (0, 6)
    assert changed["law"][0] > 0


def test_real_rows_of_another_topic_are_new_and_of_a_known_one_are_not():
    model = teach(mixture(OLD), count=60)
    tokenizer = tiny_tokenizer()
    known = look(model, texts(0, 12, seed=5), tokenizer, false_alarm=0.02)
    new = look(model, rows(), tokenizer, false_alarm=0.02)
    assert known.reason is not None
    assert set(known.known) == {"sql"}
    assert len(new.new) > len(known.new)
    assert isinstance(new.examples[0], Example)
