"""Requests that are answered together are answered as alone, whoever comes and goes meanwhile."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from dylora_moe import DyLoraMoE
from dylora_moe.serving.engine import Engine
from dylora_moe.serving.request import Event, Handle, Request, Token
from families import TARGETS, family_base
from tiny import NAMES, PLACEMENTS, tiny_base, tiny_mixture
from tinybase import tiny_tokenizer

VOCABULARY, LENGTH = 257, 60
NEAR = 1e-4
"""Answers may part where the two best logits, or the last chosen and first dropped score, are as near as this."""


def mixture(architecture: str = "llama", **settings: Any) -> DyLoraMoE:
    return tiny_mixture(architecture, base=tiny_base(architecture, vocab_size=VOCABULARY), **settings)


def engine_of(model: DyLoraMoE, **settings: Any) -> Engine:
    """An engine for answers of a known length: nothing ends them but their number of tokens."""
    engine = Engine(model, tiny_tokenizer(), **{"slots": 3, "slot_length": LENGTH, "chunk": 5, **settings})
    engine.eos = frozenset()
    return engine


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(2, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(length: int, text: int = 0, **settings: Any) -> Request:
    """A greedy request with a random prompt, the one with the number `text`."""
    return Request(prompt(length, text), **{"max_tokens": 6, "temperature": 0.0, **settings})


class Answers:
    """What an engine answers, by request."""

    def __init__(self, engine: Engine):
        self.engine, self.events = engine, {}

    def admit(self, asked: Request, steps: int = 0) -> Handle:
        handle = self.engine.admit(asked)
        self.events[handle] = []
        for _ in range(steps):
            self.step()
        return handle

    def step(self) -> list[Event]:
        events = self.engine.step()
        for event in events:
            self.events[event.handle].append(event)
        return events

    def finish(self) -> None:
        for _ in range(1000):
            if not self.engine.live + self.engine.waiting:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def tokens(self, handle: Handle) -> list[Token]:
        return [token for event in self.events[handle] for token in event.tokens]

    def ids(self, handle: Handle) -> list[int]:
        return [token.id for token in self.tokens(handle)]

    def text(self, handle: Handle) -> str:
        return "".join(event.text for event in self.events[handle])

    def reason(self, handle: Handle) -> str | None:
        assert all(event.finish_reason is None for event in self.events[handle][:-1])
        return self.events[handle][-1].finish_reason if self.events[handle] else None


def alone(model: DyLoraMoE, asked: Request) -> Any:
    """The greedy answer of `model.generate`, and its logits."""
    ids = torch.tensor([asked.prompt])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        experts=asked.expert,
        max_new_tokens=asked.max_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )


def nearly_tied(model: DyLoraMoE, asked: Request, ids: list[int], logits: Tensor) -> bool:
    best = logits.float().topk(2).values
    if best[0] - best[1] < NEAR:
        return True
    if asked.expert is not None:
        return False
    whole = torch.tensor([[*asked.prompt, *ids]])
    labels = torch.where(torch.arange(whole.shape[1]) < len(asked.prompt), -100, whole)
    scores = model(whole, labels=labels).router_logits[0].sort(descending=True).values
    kept = model.policy.top_k
    return kept is not None and bool((scores[:, kept - 1] - scores[:, kept] < NEAR).any())


def assert_as_alone(model: DyLoraMoE, asked: Request, found: list[int]) -> None:
    expected = alone(model, asked)
    ids = expected.sequences[0, len(asked.prompt) :].tolist()
    if found != ids:
        at = next(i for i, (a, b) in enumerate(zip(found, ids, strict=True)) if a != b)
        assert nearly_tied(model, asked, ids[:at], expected.logits[at][0]), f"{asked}: {found} is not {ids}"


MIXED = [(3, None), (11, "red"), (1, "base"), (14, None), (6, "green"), (8, None), (2, None), (9, "red")]


def assert_mixed_requests_as_alone(model: DyLoraMoE, **settings: Any) -> None:
    answers = Answers(engine_of(model, **settings))
    asked = [
        request(length, seed, expert=expert, max_tokens=4 + 3 * (seed % 4))
        for seed, (length, expert) in enumerate(MIXED)
    ]
    handles = [answers.admit(each, steps=2) for each in asked[:4]]
    gone = answers.admit(request(9, text=20, max_tokens=40), steps=6)
    answers.engine.cancel(gone)
    handles += [answers.admit(each, steps=1) for each in asked[4:]]
    answers.finish()
    assert answers.reason(gone) == "cancelled"
    for handle, each in zip(handles, asked, strict=True):
        assert answers.reason(handle) == "length"
        assert_as_alone(model, each, answers.ids(handle))


@pytest.mark.parametrize(
    ("architecture", "placement", "granularity"),
    [
        ("llama", "first", "prefix"),
        ("llama", "middle", "token"),
        ("llama", "middle", "sequence"),
        ("gemma2", "middle", "prefix"),  # longer than its sliding window
        ("opt", "last", "token"),
        ("llama", "last", "sequence"),
        ("gemma2", "below", "token"),
        ("llama", "below", "prefix"),
        *(
            pytest.param(architecture, placement, granularity, marks=pytest.mark.slow)
            for architecture in ("llama", "gemma2", "gpt2", "qwen2", "opt")
            for placement in PLACEMENTS
            for granularity in ("token", "sequence", "prefix")
        ),
    ],
)
def test_mixed_requests_are_answered_as_alone(architecture, placement, granularity):
    model = mixture(architecture, granularity=granularity, **PLACEMENTS[placement])
    assert_mixed_requests_as_alone(model)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"route_to_base": True}])
def test_experts_on_the_head_and_a_base_route(settings):
    assert_mixed_requests_as_alone(mixture(**settings))


OTHERS = ("mistral", "gemma3_text", "gpt_oss", "mixtral", "gptj", "xglm", "qwen3_next", "jamba", "nemotron_h")


@pytest.mark.parametrize("family", ["lfm2", *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)])
def test_families(family):
    targets = TARGETS.get(family, ["q_proj", "v_proj"])
    settings = PLACEMENTS["below"] | {"granularity": "prefix", "target_modules": targets}
    model = tiny_mixture(family, base=family_base(family), **settings)
    model.generation_config.eos_token_id = model.get_base_model().generation_config.eos_token_id = None
    engine = Engine(model, tiny_tokenizer(), slots=3, slot_length=LENGTH, chunk=5)
    engine.eos = frozenset()
    answers, asked = Answers(engine), []
    for seed, (length, expert) in enumerate(MIXED):
        ids = tuple(id % 60 + 3 for id in prompt(length, seed))
        asked.append(Request(ids, 12, expert, temperature=0.0))
    handles = [answers.admit(each, steps=1) for each in asked]
    answers.finish()
    for handle, each in zip(handles, asked, strict=True):
        assert_as_alone(model, each, answers.ids(handle))


def test_columns_move_to_the_left_when_they_are_used_up(monkeypatch):
    monkeypatch.setattr("dylora_moe.serving.slots.SLACK", 7)
    model = mixture()
    assert_mixed_requests_as_alone(model, chunk=50)


def test_sampling_with_a_seed_is_the_same_alone_and_in_a_batch():
    model = mixture()
    asked = request(7, temperature=0.9, top_p=0.8, seed=5, max_tokens=12)
    answers = Answers(engine_of(model))
    before = [answers.admit(request(4 + i, i, temperature=1.0, max_tokens=30), steps=2) for i in range(2)]
    handle = answers.admit(asked)
    answers.finish()
    by_itself = Answers(engine_of(model))
    again = by_itself.admit(asked)
    by_itself.finish()
    assert answers.ids(handle) == by_itself.ids(again)
    other = by_itself.admit(request(7, temperature=0.9, top_p=0.8, seed=6, max_tokens=12))
    by_itself.finish()
    assert by_itself.ids(other) != by_itself.ids(again)
    assert len(answers.ids(before[0])) == 30


@pytest.mark.parametrize("granularity", ["token", "sequence", "prefix"])
def test_logprobs_and_routing_are_those_of_a_plain_forward(granularity):
    model = mixture(granularity=granularity)
    answers = Answers(engine_of(model))
    answers.admit(request(12, text=1, max_tokens=20), steps=3)
    asked = request(8, logprobs=3, temperature=0.7, seed=1)
    handle = answers.admit(asked)
    forced = answers.admit(request(5, expert="blue"))
    answers.finish()
    tokens = answers.tokens(handle)
    ids = torch.tensor([[*asked.prompt, *answers.ids(handle)]])
    labels = torch.where(torch.arange(ids.shape[1]) < 8, -100, ids)  # which tell where the prompt ends
    with torch.no_grad():
        whole = model(ids, labels=labels)
    logprobs = whole.logits[0].log_softmax(-1)
    weights = whole.routing_weights[0].expand(ids.shape[1], -1)
    assert len(tokens) == 6
    for at, token in enumerate(tokens, start=7):  # what read position `at` predicted the next
        best = logprobs[at].topk(3)
        assert token.logprob == pytest.approx(float(logprobs[at, token.id]), abs=1e-4)
        assert [each.id for each in token.alternatives] == best.indices.tolist()
        assert [each.logprob for each in token.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert token.weights == pytest.approx(weights[at].tolist(), abs=1e-4)
        assert token.experts == NAMES
        assert token.expert == NAMES[int(weights[at].argmax())]
    assert {token.weights for token in answers.tokens(forced)} == {(0.0, 0.0, 1.0)}
    assert answers.tokens(forced)[0].logprob is None


def test_the_base_is_named_where_it_has_the_largest_share():
    model = mixture(route_to_base=True)
    answers = Answers(engine_of(model))
    routed, bare = answers.admit(request(9, max_tokens=30)), answers.admit(request(4, expert="base"))
    answers.finish()
    assert {token.expert for token in answers.tokens(bare)} == {"base"}
    seen = answers.tokens(routed)
    assert "base" in {token.expert for token in seen}
    assert all((1 - sum(token.weights) > max(token.weights)) == (token.expert == "base") for token in seen)


def test_a_stop_string_ends_the_text_before_it():
    model = mixture()
    answers = Answers(engine_of(model))
    whole = answers.admit(request(6, text=3, max_tokens=30))
    answers.finish()
    text = answers.text(whole)
    assert len(text) > 12
    stop = text[7:10]
    at = text.find(stop)
    handle = answers.admit(request(6, text=3, max_tokens=30, stop=("never", stop)))
    answers.finish()
    assert answers.text(handle) == text[:at]
    assert answers.reason(handle) == "stop"
    assert b"".join(token.bytes for token in answers.tokens(handle)).decode(errors="ignore") == text[:at]


def test_the_token_that_ends_an_answer_is_not_part_of_it():
    model = mixture()
    answers = Answers(engine_of(model))
    whole = answers.admit(request(6, text=3, max_tokens=12))
    answers.finish()
    ids = answers.ids(whole)
    answers.engine.eos = frozenset({ids[5]})
    handle = answers.admit(request(6, text=3, max_tokens=12))
    answers.finish()
    assert answers.ids(handle) == ids[: ids.index(ids[5])]
    assert answers.reason(handle) == "stop"


def test_cancelling_frees_the_slot_wherever_the_request_is():
    answers = Answers(engine_of(mixture(), slots=1, chunk=2))
    live = answers.admit(request(2, max_tokens=50), steps=2)
    queued = answers.admit(request(20, text=1), steps=1)
    answers.engine.cancel(queued)
    answers.engine.cancel(live)
    assert {event.finish_reason for event in answers.step()} == {"cancelled"}
    assert (answers.engine.live, answers.engine.waiting) == (0, 0)
    reading = answers.admit(request(20, text=1), steps=1)
    assert answers.engine.live == 1
    answers.engine.cancel(reading)
    assert [event.handle for event in answers.step()] == [reading]
    assert answers.engine.live == 0
    assert answers.step() == []
    last = answers.admit(request(3))
    answers.finish()
    assert answers.reason(last) == "length"
    answers.engine.cancel(last)
    assert answers.step() == []


def test_no_slot_is_lost_over_many_random_requests():
    model = mixture()
    answers = Answers(engine_of(model, slots=4, chunk=16))
    generator = torch.Generator().manual_seed(0)

    def draw(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    handles, choices = [], (None, *NAMES, "base")
    for number in range(200):
        asked = request(1 + draw(12), number, max_tokens=1 + draw(4), expert=choices[draw(5)], temperature=draw(2))
        handles.append(answers.admit(asked, steps=draw(2)))
        if draw(5) == 0:
            answers.engine.cancel(handles[draw(len(handles))])
    answers.finish()
    ended = [answers.reason(handle) for handle in handles]
    assert set(ended) == {"length", "cancelled"}
    for handle, reason in zip(handles, ended, strict=True):
        if reason == "length":
            assert len(answers.ids(handle)) == handle.request.max_tokens
    together = [answers.admit(request(3, max_tokens=9)) for _ in range(4)]
    while not answers.reason(together[0]):
        answers.step()
    assert [answers.reason(handle) for handle in together] == ["length"] * 4  # all four slots were there


@pytest.mark.parametrize("granularity", ["token", "sequence", "prefix"])
def test_an_expert_is_removed_between_two_steps(granularity):
    model = mixture(granularity=granularity)
    answers = Answers(engine_of(model))
    routed = answers.admit(request(5, max_tokens=14), steps=3)
    forced = answers.admit(request(6, text=1, expert="green", max_tokens=14), steps=3)
    other = answers.admit(request(6, text=2, expert="blue", max_tokens=14), steps=3)
    done = answers.engine.change(lambda: model.remove_expert("green"))
    answers.step()
    assert done.done()
    assert done.result() is None
    assert answers.reason(forced) == "cancelled"
    assert "'green' was removed" in str(answers.events[forced][-1].why)
    with pytest.raises(ValueError, match="unknown expert 'green'"):
        answers.engine.admit(request(3, expert="green"))
    new = answers.admit(asked := request(9, text=4))
    answers.finish()
    assert_as_alone(model, asked, answers.ids(new))
    assert_as_alone(model, other.request, answers.ids(other))
    assert [len(token.weights) for token in answers.tokens(routed)][-1] == 2
    assert len(answers.tokens(routed)) == 14


def test_requests_forced_to_an_expert_that_leaves_finish_first():
    model = mixture()
    answers = Answers(engine_of(model))
    forced = answers.admit(asked := request(6, expert="green", max_tokens=9), steps=2)
    expected = alone(model, asked).sequences[0, 6:].tolist()
    done = answers.engine.change(lambda: model.remove_expert("green"), leaving=["green"])
    with pytest.raises(ValueError, match="'green' is being removed"):
        answers.engine.admit(request(3, expert="green"))
    answers.finish()
    assert answers.ids(forced) == expected
    assert answers.engine.wait(0)  # for the change
    answers.step()
    assert done.done()
    assert model.expert_names == ["red", "blue"]


def test_a_renamed_expert_is_followed_and_an_added_one_found():
    model = mixture()
    answers = Answers(engine_of(model))
    forced = answers.admit(asked := request(6, expert="green", max_tokens=12), steps=3)
    expected = alone(model, asked).sequences[0, 6:].tolist()
    model.rename_expert("green", "moss")  # past the engine, which notices
    answers.engine.change(lambda: model.add_expert("new"))
    answers.step()
    new = answers.admit(request(4, expert="new"))
    answers.finish()
    assert answers.ids(forced) == expected
    assert answers.tokens(forced)[-1].expert == "moss"
    assert answers.tokens(new)[0].experts == ("red", "moss", "blue", "new")


def test_an_expert_below_the_router_has_the_running_requests_read_again():
    model = mixture(router_layer=2)
    answers = Answers(engine_of(model))
    routed = answers.admit(request(8, max_tokens=16), steps=6)
    written = answers.ids(routed)
    assert 2 < len(written) < 16
    low = {"layers_to_transform": [0], "target_modules": ["q_proj"], "r": 2, "init_lora_weights": False}
    config = model.lora_config("red")
    for key, value in low.items():
        setattr(config, key, value)
    answers.engine.change(lambda: model.add_expert("low", config))
    answers.finish()
    assert model.hooks.needs_first_pass
    assert answers.reason(routed) == "length"
    again = Request((*routed.request.prompt, *written), 16 - len(written), temperature=0.0)
    assert_as_alone(model, again, answers.ids(routed)[len(written) :])


def test_what_was_packed_is_dropped_with_a_change():
    model = mixture(mixing_form="gathered")
    answers = Answers(engine_of(model))
    asked = request(5)
    answers.admit(asked)
    answers.finish()
    tensors = {part.key: torch.randn_like(part.tensor) for part in model.expert_tensors("red")}
    answers.engine.change(lambda: model.load_expert("red", tensors))
    handle = answers.admit(asked)
    answers.finish()
    assert_as_alone(model, asked, answers.ids(handle))


def test_a_change_that_fails_is_told_to_whoever_asked():
    answers = Answers(engine_of(mixture()))
    handle = answers.admit(request(4))
    done = answers.engine.change(lambda: answers.engine.model.remove_expert("grey"))
    answers.finish()
    with pytest.raises(ValueError, match="unknown expert 'grey'"):
        done.result()
    assert answers.reason(handle) == "length"


def test_a_change_that_is_taken_back_is_not_made():
    answers = Answers(engine_of(mixture()))
    done = answers.engine.change(lambda: answers.engine.model.remove_expert("red"))
    assert done.cancel()
    answers.step()
    assert answers.engine.model.expert_names == list(NAMES)


def test_a_pass_that_fails_ends_its_own_requests_only(monkeypatch):
    model = mixture()
    answers = Answers(engine_of(model))
    scores = type(model.router).scores

    def failing(self, hidden, *rest):
        if hidden.shape[1] == 4:
            raise RuntimeError("no memory")
        return scores(self, hidden, *rest)

    monkeypatch.setattr(type(model.router), "scores", failing)
    good, bad = answers.admit(request(3), steps=1), answers.admit(request(4))
    answers.finish()
    assert answers.reason(good) == "length"
    assert answers.events[bad][-1].why == "RuntimeError: no memory"
    assert answers.engine.live == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(50, max_tokens=11), "50 tokens and max_tokens=11 do not fit into the 60 tokens"),
        (request(3, expert="grey"), "unknown expert 'grey'"),
        (Request((), 3), "the prompt has no token"),
        (Request((3, 257), 3), "token id 257 of the prompt"),
        (request(3, max_tokens=0), "max_tokens=0"),
        (request(3, temperature=-1.0), r"temperature=-1\.0"),
        (request(3, temperature=math.nan), "temperature=nan"),
        (request(3, top_p=0.0), r"top_p=0\.0"),
        (request(3, stop=("",)), "an empty stop string"),
        (request(3, logprobs=21), "logprobs=21"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_it_is_queued(asked, message):
    engine = engine_of(mixture())
    with pytest.raises(ValueError, match=message):
        engine.admit(asked)
    assert engine.waiting == 0
    engine.admit(request(50, max_tokens=10))


def test_a_mixture_without_a_routed_expert_serves_forced_requests():
    model = tiny_mixture(base=tiny_base(vocab_size=VOCABULARY))
    for name in NAMES:
        model.experts.states[name] = "new"
    engine = engine_of(model)
    with pytest.raises(ValueError, match="no expert is routed yet"):
        engine.admit(request(3))
    engine.admit(request(3, expert="red"))


def test_settings_that_do_not_fit_are_refused():
    model = mixture()
    with pytest.raises(ValueError, match="slot_length=65: the base has 64 positions"):
        engine_of(model, slot_length=65)
    with pytest.raises(ValueError, match="slots=0"):
        engine_of(model, slots=0)
    assert Engine(model, tiny_tokenizer()).slot_length == 64
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        engine_of(model.train())


def test_prompts_are_read_at_once_where_pieces_make_a_difference(caplog):
    model = mixture()
    embeddings: Any = model.get_base_model().get_input_embeddings()
    sizes = []

    def uneven(module: Any, args: Any, output: Tensor) -> Tensor:
        sizes.append(output.shape[1])
        return output * (1 + 0.01 * (output.shape[1] > 5))

    embeddings.register_forward_hook(uneven)
    answers = Answers(engine_of(model))
    assert not answers.engine.chunked
    assert "read in pieces" in caplog.text
    sizes.clear()
    answers.admit(request(13))
    answers.finish()
    assert sizes[0] == 13


def test_a_long_prompt_does_not_hold_up_the_others():
    answers = Answers(engine_of(mixture()))
    live = answers.admit(request(3, max_tokens=30), steps=1)
    answers.admit(request(20, text=1))
    before = len(answers.ids(live))
    for _ in range(3):  # four pieces of five tokens
        answers.step()
    assert len(answers.ids(live)) == before + 3
    assert answers.engine.live == 2


def test_threads_may_ask_while_another_one_steps():
    answers = Answers(engine_of(mixture(), slots=4, chunk=16))
    handles: list[Handle] = []

    def ask(seed: int) -> None:
        for number in range(10):
            handle = answers.engine.admit(request(3, seed * 10 + number, max_tokens=3))
            handles.append(handle)
            if number % 3 == 0:
                answers.engine.cancel(handle)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    ended = set()
    while len(ended) < 40:
        assert answers.engine.wait(timeout=20)
        ended |= {event.handle for event in answers.engine.step() if event.finish_reason}
    for thread in threads:
        thread.join()
    assert ended == set(handles)
    assert not answers.engine.wait(timeout=0)
