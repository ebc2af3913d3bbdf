"""Folding a fixed mixture into the weights: the same tokens, and every weight restored bit for bit."""

import copy

import pytest
import torch

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.layers.fold import fold, unfold
from dylora_moe.layers.in_force import Generation
from rounding import EXACT, float64_throughout
from tiny import difference
from tinybase import tiny_base


def mixture(layers: int = 4, **settings) -> DyLoraMoE:
    torch.manual_seed(0)
    config = MoELoraConfig(num_experts=3, r=4, init_lora_weights=False, **{"router_layer": 1, **settings})
    return DyLoraMoE.from_base(tiny_base(layers), config).double().eval()


def weights_of(model: DyLoraMoE) -> list[tuple[int, torch.Tensor]]:
    return [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]


def assert_as_before(model: DyLoraMoE, before: list[tuple[int, torch.Tensor]]) -> None:
    for (pointer, values), parameter in zip(before, model.parameters(), strict=True):
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, values)
    assert model.holder.generation is None


def fold_into(model: DyLoraMoE, generation: Generation, weights: list[float]) -> None:
    fold(model.get_base_model(), model.holder, generation, tuple(model.expert_names), torch.tensor(weights))


IDS = torch.arange(12).view(1, 12)
CASES = {
    "forced": ({}, {"experts": "expert_1"}, 1),
    "forced, two rows": ({}, {"experts": ["expert_1", "expert_1"]}, 2),
    "base": ({}, {"experts": "base"}, 1),
    "weights": ({}, {"routing_weights": torch.tensor([0.2, 0.0, 0.8])}, 2),
    "sequence": ({"granularity": "sequence"}, {}, 1),
    "some layers mix on": ({"lora_bias": True, "target_modules": ["q_proj"]}, {"experts": "expert_0"}, 1),
    "routing pass": ({"granularity": "sequence", "router_layer": "last"}, {}, 1),
}


@pytest.mark.parametrize("case", CASES)
@float64_throughout()
def test_folded_generation_equals_the_mixed_one(case):
    settings, call, rows = CASES[case]
    model = mixture(**settings)
    before = weights_of(model)
    arguments = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        **call,
    }
    expected = model.generate(IDS.repeat(rows, 1), **arguments)
    base = model.generate(IDS.repeat(rows, 1), **{**arguments, "routing_weights": None, "experts": "base"})
    found = model.generate(IDS.repeat(rows, 1), fold=True, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other, bare in zip(found.logits, expected.logits, base.logits, strict=True):
        assert difference(one, other) <= EXACT
        assert (case == "base") == torch.equal(other, bare)
    assert_as_before(model, before)


@float64_throughout()
def test_a_tied_head_is_not_folded_into_the_embedding():
    base = tiny_base()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = MoELoraConfig(
        num_experts=2, r=4, init_lora_weights=False, router_layer=1, target_modules=["q_proj", "lm_head"]
    )
    model = DyLoraMoE.from_base(base, config).double().eval()
    assert model.get_base_model().lm_head.base_layer.weight is model.get_base_model().model.embed_tokens.weight
    arguments = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, "experts": "expert_1"}
    expected = model.generate(IDS, do_sample=False, **arguments)
    found = model.generate(IDS, do_sample=False, fold=True, **arguments)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert difference(one, other) <= EXACT


def test_layers_are_folded_while_it_runs_and_restored_after_an_error():
    model = mixture()
    before, seen = weights_of(model), []

    def stop(ids, scores):
        seen.append(dict(model.holder.generation.folded))
        if len(seen) == 3:
            raise RuntimeError("stop")
        return scores

    with pytest.raises(RuntimeError, match="stop"):
        model.generate(IDS, experts="expert_0", fold=True, max_new_tokens=6, logits_processor=[stop])
    adapted = {layer.routing_name for layer in model.routed_layers}
    assert all(set(folded) == adapted for folded in seen)
    assert_as_before(model, before)


def test_another_call_in_between_sees_the_original_weights():
    model = mixture()
    expected = {name: model(IDS, experts=name).logits for name in ("base", "expert_2")}
    routed = model(IDS).logits
    whole = model.generate(IDS, experts="expert_0", max_new_tokens=5, do_sample=False)

    def look(ids, scores):
        for name, logits in expected.items():
            assert torch.equal(model(IDS, experts=name).logits, logits)
        assert torch.equal(model(IDS).logits, routed)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, expected["base"])
        return scores

    found = model.generate(
        IDS, experts="expert_0", fold=True, max_new_tokens=5, do_sample=False, logits_processor=[look]
    )
    assert torch.equal(found, whole)


def test_the_memory_of_a_fold_serves_the_next_one_until_training_or_a_move():
    model = mixture()
    before, arguments = weights_of(model), {"fold": True, "max_new_tokens": 4, "do_sample": False}
    found = [model.generate(IDS, experts="expert_0", **arguments)]
    kept = {name: memory.data_ptr() for name, memory in model.holder.layers.spare.items()}
    assert set(kept) == {layer.routing_name for layer in model.routed_layers}
    model.generate(IDS, experts="expert_1", **arguments)
    assert {name: memory.data_ptr() for name, memory in model.holder.layers.spare.items()} == kept
    found.append(model.generate(IDS, experts="expert_0", **arguments))
    assert_as_before(model, before)
    model.train().eval()
    assert not model.holder.layers.spare
    found.append(model.generate(IDS, experts="expert_0", **arguments))
    model.get_base_model().float()  # which the mixture does not see
    found.append(model.generate(IDS, experts="expert_0", **arguments))
    model.to(torch.float64)
    assert not model.holder.layers.spare
    found.append(model.generate(IDS, experts="expert_0", **arguments))
    assert all(torch.equal(tokens, found[0]) for tokens in found)


@torch.no_grad()
def test_a_prompt_of_sequence_granularity_runs_folded_already(monkeypatch):
    """Its decision is known when the router has read, below the first adapted layer."""
    model = mixture(granularity="sequence")
    monkeypatch.setattr("dylora_moe.layers.routed.mix_group", None)  # nothing is mixed
    model.generate(IDS, fold=True, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    ("settings", "call", "rows", "message"),
    [
        ({}, {}, 1, "routing per token changes"),
        ({"granularity": "sequence"}, {}, 2, "one mixture at a time"),
        ({}, {"experts": ["expert_0", "expert_1"]}, 2, "one mixture at a time"),
        ({}, {"experts": ["expert_0", None]}, 2, "one mixture at a time"),
        ({}, {"routing_weights": torch.ones(2, 3) / 3}, 2, "one mixture at a time"),
    ],
)
def test_what_is_not_one_fixed_mixture_is_refused(settings, call, rows, message):
    with pytest.raises(ValueError, match=message):
        mixture(**settings).generate(IDS.repeat(rows, 1), fold=True, max_new_tokens=2, **call)


def test_folding_twice_keeps_the_first_original():
    model = mixture()
    before = weights_of(model)
    generation = Generation()
    for weights in ([1.0, 0.0, 0.0], [0.0, 0.5, 0.5]):
        fold_into(model, generation, weights)
    unfold(model.holder, generation)
    assert_as_before(model, before)


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({}, {"experts": "expert_1"}),
        pytest.param({}, {"routing_weights": torch.tensor([0.2, 0.3, 0.5])}, marks=pytest.mark.slow),
        pytest.param({"granularity": "sequence"}, {}, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_gets_its_weights_back(settings, call):
    torch._dynamo.reset()
    plain, fast = mixture(2, **settings), mixture(2, **settings)
    before = weights_of(fast)
    fast.compile(backend="eager", fullgraph=True)
    options = {"max_new_tokens": 4, "do_sample": False, **call}
    for _ in range(2):
        assert torch.equal(fast.generate(IDS, fold=True, **options), plain.generate(IDS, **options))
        assert_as_before(fast, before)
    torch._dynamo.reset()


def within(model: DyLoraMoE, action) -> list:
    """A logits processor that acts once in the middle of a generation."""
    seen = []

    def act(ids, scores):
        if not seen:
            seen.append(action())
        return scores

    return [act]


def test_a_folding_call_within_one_has_its_own_mixture():
    model = mixture()
    before, inner = weights_of(model), []
    options = {"max_new_tokens": 6, "do_sample": False, "fold": True}
    first, second = (model.generate(IDS, experts=name, **options) for name in ("expert_0", "expert_1"))
    processors = within(model, lambda: inner.append(model.generate(IDS, experts="expert_0", **options)))
    assert torch.equal(model.generate(IDS, experts="expert_1", logits_processor=processors, **options), second)
    assert torch.equal(inner[0], first)
    assert_as_before(model, before)


def test_folding_in_inference_mode_and_out_of_it():
    model = mixture()
    options = {"max_new_tokens": 3, "do_sample": False, "fold": True, "experts": "expert_1"}
    with torch.inference_mode():
        inside = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, **options), inside)


def test_an_interrupt_while_weights_are_put_back_loses_none(monkeypatch):
    model = mixture()
    before = weights_of(model)
    generation = Generation()
    fold_into(model, generation, [0.2, 0.3, 0.5])

    class Interrupted(dict):
        def __setitem__(self, *_):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model.holder.layers, "spare", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            unfold(model.holder, generation)
    unfold(model.holder, generation)
    assert_as_before(model, before)


def test_a_pickled_routing_leaves_the_spare_memory_behind():
    model = mixture()
    model.generate(IDS, max_new_tokens=2, fold=True, experts="expert_1")
    assert model.holder.layers.spare
    assert not copy.deepcopy(model).holder.layers.spare
