"""State that one call leaves to the next: none. Forced blocks, copies, pickles, threads, errors, stale matrices."""

import contextvars
import copy
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dylora_moe import DyLoraMoE, enable_routing
from tiny import (
    NAMES,
    PLACEMENTS,
    every_architecture,
    every_placement,
    gradients,
    mixed_experts,
    tiny_base,
    tiny_mixture,
    tokens,
)

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def step(model: Any, **options: Any) -> dict[str, Tensor]:
    """Logits and gradients of one training step from seed 3."""
    torch.manual_seed(3)
    out = model(tokens(), labels=tokens(), **options)
    out.loss.backward()
    found = gradients(model)
    model.zero_grad()
    return {"logits": out.logits, **found}


def assert_bitwise(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def nothing_in_force(model: DyLoraMoE) -> bool:
    return model.hooks.call is None and model.holder.generation is None and model.holder.now is model.holder.resting


def routed_peft(architecture: str = "llama") -> Any:
    experts = mixed_experts(architecture)
    model = get_peft_model(tiny_base(architecture), experts["red"], adapter_name="red")
    for name in ("green", "blue"):
        model.add_adapter(name, experts[name])
    model.base_model.set_adapter(list(NAMES))
    return enable_routing(model).eval()


@every_placement
def test_use_experts_forces_within_the_block_only(placement):
    model, ids = tiny_mixture("llama", **PLACEMENTS[placement]), tokens()
    routed = model(ids).logits
    forced = {name: model(ids, experts=name).logits for name in (*NAMES, "base")}
    generated = {name: model.generate(ids, experts=name, **GREEDY) for name in ("red", "base")}
    with model.use_experts("red") as same:
        assert same is model
        assert torch.equal(model(ids).logits, forced["red"])
        assert torch.equal(model.generate(ids, **GREEDY), generated["red"])
        assert torch.equal(model.get_base_model()(ids).logits, forced["red"])  # as TRL calls it
        assert torch.equal(model(ids, experts="blue").logits, forced["blue"])  # the call's own word counts
        with model.use_experts("base"):
            assert torch.equal(model(ids).logits, forced["base"])
            assert torch.equal(model.generate(ids, **GREEDY), generated["base"])
        assert torch.equal(model(ids).logits, forced["red"])
    with pytest.raises(KeyError), model.use_experts("green"):
        raise KeyError
    assert torch.equal(model(ids).logits, routed)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@every_architecture
def test_copies_are_models_of_their_own(architecture, duplicate):
    model = tiny_mixture(architecture, lora_dropout=0.1, **PLACEMENTS["below"]).train()
    model.freeze_expert("green")
    model.get_base_model().activation_checkpointing_enable()
    expected = step(model)
    twin = duplicate(model)
    assert type(twin) is DyLoraMoE
    assert all(layer.holder is twin.holder is not model.holder for layer in twin.routed_layers)
    with model.use_experts("red"):
        assert_bitwise(step(twin), expected)
    with model.trace() as trace:
        twin(tokens())
        assert trace.passes == []
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert_bitwise(step(model), expected)
    twin.add_expert("late")
    assert model.expert_names == list(NAMES)
    del model
    twin(tokens(), experts="late")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_a_routed_peft_model(duplicate):
    model, weights = routed_peft(), torch.rand(3)
    expected = step(model, routing_weights=weights)
    twin = duplicate(model)
    assert type(twin) is type(model)
    assert_bitwise(step(twin, routing_weights=weights), expected)
    assert twin.holder is not model.holder


def in_threads(*functions: Callable[[], Any]) -> list[list[Any]]:
    """What each function returns, five times, all of them running at once."""
    results: list[list[Any]] = [[] for _ in functions]
    barrier = threading.Barrier(len(functions))

    def work(index: int) -> None:
        barrier.wait()
        for _ in range(5):
            results[index].append(functions[index]())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def _switch_often():
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switch_often")
@pytest.mark.parametrize("placement", ["middle", "below"])
def test_threads_take_turns(placement):
    model, ids = tiny_mixture("llama", **PLACEMENTS[placement]), tokens()
    functions = [
        lambda: model(ids, experts="red").logits,
        lambda: model(ids).logits,
        lambda: model.generate(ids, experts=["blue", None], **GREEDY),
        lambda: model(ids, routing_weights=torch.tensor([0.2, 0.3, 0.5])).logits,
    ]
    expected = [function() for function in functions]
    for found, wanted in zip(in_threads(*functions), expected, strict=True):
        assert len(found) == 5
        assert all(torch.equal(result, wanted) for result in found)


@pytest.mark.usefixtures("_switch_often")
def test_threads_take_turns_in_a_routed_peft_model():
    model, ids = routed_peft(), tokens()
    functions = [
        lambda: model(ids, routing_weights=torch.tensor([1.0, 0.0, 0.0])).logits,
        lambda: model(ids).logits,
        lambda: model.generate(ids, routing_weights=torch.tensor([0.0, 1.0, 0.0]), **GREEDY),
    ]
    expected = [function() for function in functions]
    for found, wanted in zip(in_threads(*functions), expected, strict=True):
        assert len(found) == 5
        assert all(torch.equal(result, wanted) for result in found)


@pytest.mark.usefixtures("_switch_often")
def test_a_recompute_does_not_disturb_another_thread():
    model, ids = tiny_mixture("llama").train(), tokens()
    model.get_base_model().activation_checkpointing_enable()

    def train() -> list[Tensor]:
        return list(torch.autograd.grad(model(ids, labels=ids, experts="red").loss, parameters))

    def look() -> list[Tensor]:
        with torch.no_grad():
            return [model(ids, experts="blue").logits]

    parameters = [t.tensor for t in model.expert_tensors("red")]
    expected = [train(), look()]
    for found, wanted in zip(in_threads(train, look), expected, strict=True):
        assert len(found) == 5
        for result in found:
            assert all(torch.equal(one, other) for one, other in zip(result, wanted, strict=True))


@pytest.mark.usefixtures("_switch_often")
def test_forced_blocks_and_traces_belong_to_their_thread():
    model, ids = tiny_mixture("llama"), tokens()
    routed, red = model(ids).logits, model(ids, experts="red").logits
    inside, outside = threading.Event(), threading.Event()
    seen: dict[str, Any] = {}

    def block() -> None:
        with model.use_experts("red"), model.trace() as trace:
            inside.set()
            outside.wait(60)
            seen["block"], seen["passes"] = model(ids).logits, len(trace.passes)

    thread = threading.Thread(target=block)
    thread.start()
    inside.wait(60)
    assert torch.equal(model(ids).logits, routed)  # while the other thread is in its block
    outside.set()
    thread.join()
    assert torch.equal(seen["block"], red)
    assert seen["passes"] == 1


def test_a_thread_started_with_the_context_is_in_the_block():
    """As a generation in a streamer's thread is."""
    model, ids, found = tiny_mixture("llama"), tokens(), []
    red = model.generate(ids, experts="red", **GREEDY)

    def generate() -> None:
        found.append(model.generate(ids, **GREEDY))

    with model.use_experts("red"), model.trace() as trace:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(generate,))
        thread.start()
        thread.join()
        assert len(trace.passes) == 6
        stranger = threading.Thread(target=generate)
        stranger.start()
        stranger.join()
        assert len(trace.passes) == 6
    assert torch.equal(found[0], red)
    assert not torch.equal(found[1], red)


def test_experts_do_not_change_within_another_threads_generation():
    model, ids = tiny_mixture("llama"), tokens()
    expected = model.generate(ids, experts="red", **GREEDY)
    begun, names, found = threading.Event(), [], []

    class Begin(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            begun.set()
            time.sleep(0.05)
            names.append(model.expert_names)
            return scores

    def generate() -> None:
        processors = LogitsProcessorList([Begin()])
        found.append(model.generate(ids, experts="red", logits_processor=processors, **GREEDY))

    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait(60)
    model.remove_expert("green")  # waits for its turn
    assert len(names) == 6
    thread.join()
    assert names == [list(NAMES)] * 6
    assert torch.equal(found[0], expected)
    assert model.expert_names == ["red", "blue"]


class Break(Exception):
    pass


@pytest.mark.parametrize(
    "where", ["layers.0.self_attn", "layers.2.mlp", "layers.3.self_attn.q_proj", "norm", "lm_head"]
)
@pytest.mark.parametrize("entry", ["model", "base", "generate"])
@pytest.mark.parametrize("placement", ["middle", "below"])
def test_nothing_stays_in_force_after_an_error(placement, entry, where):
    model, ids = tiny_mixture("llama", **PLACEMENTS[placement]), tokens()
    expected, forced = model(ids).logits, model(ids, experts="red").logits
    run = {"model": model, "base": model.get_base_model(), "generate": lambda ids: model.generate(ids, **GREEDY)}[entry]
    module = model.get_base_model().get_submodule(where if where == "lm_head" else f"model.{where}")

    def fail(*_: Any) -> None:
        raise Break

    handle = module.register_forward_hook(fail)
    with pytest.raises(Break):
        run(ids)
    with pytest.raises(Break):
        model(ids, experts=["red", "blue"])
    handle.remove()
    assert nothing_in_force(model)
    assert len(model.placement.layers(model.get_base_model())) == 4
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids, experts="red").logits, forced)


def test_nothing_stays_in_force_after_a_call():
    model = tiny_mixture("llama", **PLACEMENTS["below"])
    for run in (
        lambda: model(tokens()),
        lambda: model(tokens(), experts=["red", "base"]),
        lambda: model.generate(tokens(), **GREEDY),
        lambda: model.get_base_model()(tokens()),
        lambda: model.get_base_model().model(tokens()),
        lambda: model.train()(tokens(), labels=tokens()).loss.backward(),
    ):
        run()
        assert nothing_in_force(model)


def change_data(model: DyLoraMoE) -> None:
    for tensor in model.expert_tensors("red"):
        tensor.tensor.data.mul_(1.5)


def step_fused_adamw(model: DyLoraMoE) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(tokens(), labels=tokens()).loss.backward()
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()
    model.zero_grad()


def load_state(model: DyLoraMoE) -> None:
    changed = {name: value + 0.1 for name, value in model.state_dict().items() if ".lora_B." in name}
    model.load_state_dict(changed, strict=False)


def swap_data(model: DyLoraMoE) -> None:
    for tensor in model.expert_tensors("blue"):
        tensor.tensor.data = 1.5 * tensor.tensor.data


@pytest.mark.parametrize("change", [change_data, step_fused_adamw, load_state, swap_data])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("placement", ["middle", "below"])
def test_a_stale_matrix_is_never_seen(placement, mode, change):
    model, ids = tiny_mixture("llama", **PLACEMENTS[placement]), tokens()
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    with mode():
        before = model.generate(ids, **options)
        plain = model(ids).logits
    change(model)  # in evaluation mode throughout
    with mode():
        after = model.generate(ids, **options)
        assert not torch.equal(model(ids).logits, plain)
    assert not torch.equal(torch.stack(after.logits), torch.stack(before.logits))
    with torch.no_grad():
        expected = copy.deepcopy(model).generate(ids, **options)
    assert torch.equal(after.sequences, expected.sequences)
    assert torch.equal(torch.stack(after.logits), torch.stack(expected.logits))
    step(model.train())  # no tensor of an inference mode is left


class AskAnotherExpert(LogitsProcessor):
    """Calls the mixture, forced otherwise, in the middle of its own generation."""

    def __init__(self, model: DyLoraMoE):
        self.model, self.answers = model, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.answers.append(self.model(input_ids, experts=["green", "blue"]).logits)
        return scores


@every_placement
def test_a_call_within_a_generation(placement):
    model, ids = tiny_mixture("llama", **PLACEMENTS[placement]), tokens()
    expected = model.generate(ids, experts=["red", "green"], **GREEDY)
    asked = AskAnotherExpert(model)
    found = model.generate(ids, experts=["red", "green"], logits_processor=LogitsProcessorList([asked]), **GREEDY)
    assert torch.equal(found, expected)
    with torch.no_grad():
        for length, answer in enumerate(asked.answers, start=ids.shape[1]):
            assert torch.equal(answer, model(found[:, :length], experts=["green", "blue"]).logits)
