"""Novelty of a mixture: taught texts are known, others new; the background is read once; the library decides."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dylora_moe import DyLoraMoE
from dylora_moe.skills import novelty as novelty_module
from tinybase import tiny_base, tiny_tokenizer
from topics import NAMES, mixture, teach, texts

ROWS = 25
"""Per skill: enough in all for a false alarm rate of 1 %."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYLORA_MOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model() -> DyLoraMoE:
    return teach(mixture(), *NAMES[:4], count=ROWS)


def test_taught_texts_are_known_and_others_are_newer(model):
    tokenizer = tiny_tokenizer()
    known = model.novelty(texts(0, 20, seed=1), tokenizer=tokenizer)
    new = model.novelty(texts(4, 20, seed=1), tokenizer=tokenizer)
    assert sum(one.answer == "known" and one.skill == "sql" for one in known) >= 15
    low, high = (sorted(one.score for one in found)[10] for found in (known, new))
    assert high > low
    together = model.novelty(texts(0, 8, seed=2), batch=True, tokenizer=tokenizer)
    assert (together.answer, together.skill) == ("known", "sql")
    assert model.novelty(["#$%&" * 20] * 4, batch=True, tokenizer=tokenizer).answer == "new"


def test_a_row_that_was_taught_with_is_no_exception_to_the_form_of_rows(model):
    for rows, message in (("one text", "a list of texts"), ([""], "row 1 is empty"), ([], "no rows were given")):
        with pytest.raises(ValueError, match=message):
            model.novelty(rows, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="separator"):
        model.novelty(["some text"], tokenizer=tiny_tokenizer(), separator=" : ")
    with pytest.raises(ValueError, match=r"no skill was taught yet.*call teach"):
        mixture().novelty(["some text"], tokenizer=tiny_tokenizer())


def test_any_order_of_teaching_and_a_checkpoint_give_the_same(model, tmp_path):
    rows, tokenizer = texts(4, 5), tiny_tokenizer()
    expected = model.novelty(rows, tokenizer=tokenizer)
    assert teach(mixture(), *NAMES[3::-1], count=ROWS).novelty(rows, tokenizer=tokenizer) == expected
    model.save_pretrained(tmp_path / "mixture")
    loaded = DyLoraMoE.from_pretrained(str(tmp_path / "mixture"), base=tiny_base())
    assert loaded.novelty(rows, tokenizer=tokenizer) == expected


def test_what_changes_the_library_changes_what_is_known():
    model, tokenizer = teach(mixture(), *NAMES[:3], count=ROWS), tiny_tokenizer()
    before = model.novelty(texts(3, 5), tokenizer=tokenizer)
    teach(model, "chat", count=ROWS)
    after = model.novelty(texts(3, 5), tokenizer=tokenizer)
    assert all(new.score < old.score and new.skill == "chat" for new, old in zip(after, before, strict=True))
    model.forget("chat")
    assert model.novelty(texts(3, 5), tokenizer=tokenizer) == before
    model.rename_expert("law", "legal")
    assert {one.skill for one in model.novelty(texts(1, 5), tokenizer=tokenizer)} == {"legal"}
    model.skills.compact()
    assert model.novelty(texts(1, 5), tokenizer=tokenizer)[0].skill == "legal"


def test_the_nearest_skills_begin_with_the_one_that_is_named(model):
    rows, tokenizer = texts(1, 6), tiny_tokenizer()
    for one, nearest in zip(
        model.novelty(rows, tokenizer=tokenizer), model.nearest_skills(rows, tokenizer=tokenizer), strict=True
    ):
        assert nearest[0] == (one.skill, one.score)
        assert sorted(name for name, _ in nearest) == sorted(model.skills)
        assert [score for _, score in nearest] == sorted(score for _, score in nearest)


def test_a_prompt_alone_is_all_prompt(model):
    prompts, tokenizer = [row["prompt"] for row in texts(1, 8, seed=3) if isinstance(row, dict)], tiny_tokenizer()
    views = model.views([{"prompt": prompt} for prompt in prompts], tokenizer=tokenizer)
    assert views.counts.tolist() == [[len(prompt) - 1, 0] for prompt in prompts]
    assert {one.skill for one in model.novelty([{"prompt": each} for each in prompts], tokenizer=tokenizer)} == {"law"}
    with pytest.raises(ValueError, match="'prompt' and 'completion'"):
        model.teach("law", [{"prompt": prompts[0]}], tokenizer)
    with pytest.raises(ValueError, match="'prompt' is 5"):
        model.novelty([{"prompt": 5}], tokenizer=tokenizer)


def test_getting_ready_leaves_others_their_turns_and_can_be_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path))
    model, tokenizer = teach(mixture(), *NAMES[:2], count=ROWS), tiny_tokenizer()
    inside = []

    def stop(done: int, count: int) -> None:
        other = threading.Thread(target=lambda: inside.append(model(torch.tensor([[1, 2]])).logits.isfinite().all()))
        other.start()
        other.join(20)  # it gets its turn
        if done == 3:
            raise InterruptedError(f"{done} of {count}")

    with pytest.raises(InterruptedError, match="3 of 517"):
        model.prepare_novelty(tokenizer, progress=stop)
    assert inside == [True] * 3
    assert not list(tmp_path.iterdir())
    seen = []
    model.prepare_novelty(tokenizer, progress=lambda done, count: seen.append(done))
    assert seen == [*range(1, 518)]
    model.prepare_novelty(tokenizer, progress=lambda done, count: seen.append(done))
    assert len(seen) == 517


def test_others_get_their_turns_between_two_rows(model):
    rows, tokenizer, seen, ended = texts(2, 20, seed=7), tiny_tokenizer(), [], threading.Event()
    expected = model.views(rows, tokenizer=tokenizer)
    model.views(["other rows"], tokenizer=tokenizer)

    def other() -> None:
        while not ended.is_set():
            with model.holder.lock.turn():
                seen.append((model.training, model.hooks.call))

    model.train()
    thread = threading.Thread(target=other)
    with model.holder.lock.turn():
        thread.start()
        model.views(["it waits at the door"], tokenizer=tokenizer)
        assert not seen
    found = model.views(rows, tokenizer=tokenizer)
    ended.set()
    thread.join()
    model.eval()
    assert len(seen) >= len(rows)
    assert set(seen) == {(True, None)}  # it finds the model as it was
    assert torch.equal(found.states, expected.states)


def test_too_few_rows_are_said_once(caplog):
    model, tokenizer = teach(mixture(), *NAMES[:2], count=ROWS), tiny_tokenizer()
    for _ in range(3):
        model.novelty(texts(0, 4), tokenizer=tokenizer, false_alarm=1e-5)
    model.novelty(texts(0, 4), tokenizer=tokenizer, false_alarm=1e-6)
    said = [message for message in caplog.messages if "nothing will be called new" in message]
    assert len(said) == 2
    for message, rate in zip(said, ("1e-05", "1e-06"), strict=True):
        assert f"by {2 * ROWS} scores" in message
        assert f"{rate} was asked" in message


def test_nothing_is_changed_and_nothing_read_twice(model, monkeypatch):
    tokenizer = tiny_tokenizer()
    model.novelty(["ab" * 20], tokenizer=tokenizer)
    router = {name: tensor.clone() for name, tensor in model.router.state_dict().items()}
    skills, made = model.skills, []
    monkeypatch.setattr(novelty_module.Detector, "__init__", lambda *arguments: made.append(arguments))
    monkeypatch.setattr("dylora_moe.model.background_views", lambda *arguments: made.append(arguments))
    monkeypatch.setattr("dylora_moe.model.Reading.of", lambda *arguments: made.append(arguments))
    model.train()
    started = time.perf_counter()
    model.novelty(["ab" * 20], tokenizer=tokenizer)
    assert time.perf_counter() - started < 1  # milliseconds, on a machine with nothing else to do
    assert not made
    assert model.training
    assert model.skills is skills
    assert all(torch.equal(model.router.state_dict()[name], tensor) for name, tensor in router.items())
    model.eval()


def test_a_mixture_with_a_trained_router_knows_as_well():
    model = teach(mixture(router_type="mlp"), "sql", count=ROWS)
    assert model.novelty(texts(0, 3), tokenizer=tiny_tokenizer(), false_alarm=0.1)[0].skill == "sql"


@pytest.mark.parametrize("place", [0, "last"])
def test_wherever_the_router_reads(place):
    model = teach(mixture(router_layer=place), "sql", "law", count=8)
    found = model.novelty(texts(1, 3), tokenizer=tiny_tokenizer(), false_alarm=0.1)
    assert all(torch.isfinite(torch.tensor(one.score)) for one in found)
