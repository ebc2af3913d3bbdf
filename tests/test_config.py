"""MoELoraConfig: defaults, every wrong value, and where its experts go."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.config import check_expert_name
from stock import assert_unchanged, snapshot
from tiny import ARCHITECTURES, LAYERS, tiny_base


def adapted_layers(model: DyLoraMoE) -> set[int]:
    return {model.placement.layer_of(layer.routing_name) for layer in model.routed_layers}


def test_defaults():
    config = MoELoraConfig()
    assert config.num_experts == 4
    assert config.expert_names == ["expert_0", "expert_1", "expert_2", "expert_3"]
    assert (config.task_type, config.router_type, config.router_hidden_size) == ("CAUSAL_LM", "mlp", 64)
    assert (config.granularity, config.temperature, config.top_k, config.train_top_k) == ("token", 1.0, None, None)
    assert (config.balance_loss, config.balance_coefficient, config.z_loss_coefficient) == ("uniform_mse", 0.01, 0.0)
    assert config.route_to_base is False


def test_names_give_the_number_of_experts():
    assert MoELoraConfig(expert_names=["sql", "math"]).num_experts == 2


WRONG = [
    ({"num_experts": 0}, "num_experts=0", "at least one"),
    ({"num_experts": True}, "num_experts=True", "at least one"),
    ({"num_experts": 2.0}, "num_experts=2.0", "at least one"),
    ({"num_experts": 3, "expert_names": ["sql", "math"]}, "num_experts=3", "leave one of the two out"),
    ({"expert_names": []}, "0 expert_names", "leave one of the two out"),
    ({"expert_names": "sql"}, "expert_names='sql'", "a list"),
    ({"top_k": 0}, "top_k=0", "choose 1 to 4"),
    ({"top_k": 5}, "top_k=5", "choose 1 to 4, or add experts"),
    ({"top_k": 1.0}, "top_k=1.0", "choose 1 to 4"),
    ({"top_k": True}, "top_k=True", "choose 1 to 4"),
    ({"train_top_k": 5}, "train_top_k=5", "choose 1 to 4"),
    ({"top_k": 6, "route_to_base": True}, "top_k=6", "choose 1 to 5 (the base route counts)"),
    ({"router_layer": -1}, "router_layer=-1", '"last"'),
    ({"router_layer": "first"}, "router_layer='first'", '"last"'),
    ({"router_layer": 1.0}, "router_layer=1.0", "index"),
    ({"router_layer": True}, "router_layer=True", "index"),
    ({"router_type": "transformer"}, "router_type='transformer'", "mlp, linear"),
    ({"router_hidden_size": 0}, "router_hidden_size=0", "positive"),
    ({"router_hidden_size": 1.5}, "router_hidden_size=1.5", "positive"),
    ({"granularity": "word"}, "granularity='word'", "token, sequence, prefix"),
    ({"temperature": 0}, "temperature=0", "greater than 0"),
    ({"temperature": -1.0}, "temperature=-1.0", "greater than 0"),
    ({"temperature": float("nan")}, "temperature=nan", "greater than 0"),
    ({"temperature": float("inf")}, "temperature=inf", "number"),
    ({"temperature": "1"}, "temperature='1'", "number"),
    ({"balance_loss": "kl"}, "balance_loss='kl'", "uniform_mse, switch, "),
    ({"balance_coefficient": -0.1}, "balance_coefficient=-0.1", "from 0 (off)"),
    ({"balance_coefficient": float("nan")}, "balance_coefficient=nan", "from 0 (off)"),
    ({"balance_coefficient": None}, "balance_coefficient=None", "number"),
    ({"z_loss_coefficient": -1}, "z_loss_coefficient=-1", "from 0 (off)"),
    ({"r": 0}, "r=0", "positive integer"),
    ({"r": 1.5}, "r=1.5", "positive integer"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0", "positive integer"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0", "from 0"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1", "from 0"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']", "target_modules"),
    ({"bias": "all"}, "bias='all'", 'bias="none"'),
    ({"bias": "lora_only"}, "bias='lora_only'", "lora_bias"),
    ({"target_parameters": ["w"]}, "target_parameters=['w']", "target_modules"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices", "leave it out"),
    ({"layer_replication": [(0, 2)]}, "layer_replication", "base"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'", "gaussian"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'", "gaussian"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora'", "gaussian"),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda'", "gaussian"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'", "gaussian"),
    ({"arrow_config": {"top_k": 1}}, "arrow_config", "leave it out"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens", "leave it out"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora", "leave it out"),
    ({"layers_to_transform": [1], "layers_pattern": "h"}, "layers_pattern='h'", "leave it out"),
]


@pytest.mark.filterwarnings("ignore:.*CorDA")
@pytest.mark.parametrize(("settings", "value", "remedy"), WRONG, ids=[value for _, value, _ in WRONG])
def test_wrong_value_is_named_with_the_remedy(settings, value, remedy):
    with pytest.raises(ValueError, match=re.escape(value)) as caught:
        MoELoraConfig(**settings)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("settings", [{"top_k": 4}, {"train_top_k": 1}, {"top_k": 5, "route_to_base": True}])
def test_largest_and_smallest_top_k_are_allowed(settings):
    assert MoELoraConfig(**settings).num_experts == 4


@pytest.mark.parametrize("name", ["", "1st", "a.b", "two words", "naïve", "_hidden", "-x", "a/b", 3, None])
def test_expert_name_of_the_wrong_form(name):
    with pytest.raises(ValueError, match=f"expert name {name!r}: use a letter"):
        MoELoraConfig(expert_names=["sql", name])


@pytest.mark.parametrize("name", ["base", "default", "weight", "bias", "keys", "values", "pop", "copy", "forward"])
def test_reserved_expert_name(name):
    with pytest.raises(ValueError, match=f"expert name '{name}' is reserved"):
        MoELoraConfig(expert_names=[name])


def test_doubled_expert_name():
    with pytest.raises(ValueError, match="expert 'sql' exists already"):
        MoELoraConfig(expert_names=["sql", "math", "sql"])


def test_names_that_differ_in_case_make_no_new_mixture():
    names = ["sql", "math", "SQL"]
    with pytest.raises(ValueError, match="'SQL': it differs from 'sql' in capitals only"):
        DyLoraMoE.from_base(tiny_base(), MoELoraConfig(expert_names=names, target_modules=["q_proj"]))
    adapters = {name: LoraConfig(target_modules=["q_proj"]) for name in names}
    with pytest.raises(ValueError, match="'SQL': it differs from 'sql' in capitals only"):
        DyLoraMoE.from_adapters(tiny_base(), adapters)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "mlp"), ("llama", "q_proj"), ("llama", "model"), ("gpt2", "c_attn"), ("gpt2", "h"), ("opt", "fc1")],
)
def test_part_of_a_module_path_is_refused_and_the_base_left_alone(architecture, name):
    base = tiny_base(architecture)
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"expert name '{name}' is reserved"):
        DyLoraMoE.from_base(base, MoELoraConfig(expert_names=["sql", name], target_modules="all-linear"))
    assert_unchanged(base, before)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "router", "base_model", "base_layer"])
def test_part_of_an_adapted_path_is_refused(name):
    with pytest.raises(ValueError, match=f"expert name '{name}' is reserved"):
        check_expert_name(name, base=tiny_base())


@pytest.mark.parametrize("name", ["sql", "Q", "a-b_c1", "mlps", "weights"])
def test_allowed_expert_name(name):
    check_expert_name(name, taken=["math"], base=tiny_base())


def test_router_layer_outside_the_base():
    base = tiny_base()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r'router_layer=4: the base has 4 decoder layers; choose 0 to 3, or "last"'):
        DyLoraMoE.from_base(base, MoELoraConfig(router_layer=4, target_modules="all-linear"))
    assert_unchanged(base, before)


@pytest.mark.parametrize(("layers", "expected"), [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (30, 7)])
def test_default_router_layer_is_a_quarter_of_the_way_up(layers, expected):
    assert MoELoraConfig().resolve_router_layer(layers) == expected


def test_router_layer_last_is_the_final_state():
    assert MoELoraConfig(router_layer="last").resolve_router_layer(30) == 30


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_experts_adapt_every_linear_layer_from_the_router_upwards(architecture):
    base = tiny_base(architecture)
    placed = DyLoraMoE.from_base(base, MoELoraConfig(num_experts=1, r=2, target_modules="all-linear"))
    linear = {"llama": 7, "qwen2": 7, "gemma2": 7, "gpt2": 4, "opt": 6}[architecture]
    by_layer = [placed.placement.layer_of(layer.routing_name) for layer in placed.routed_layers]
    assert {layer: by_layer.count(layer) for layer in by_layer} == {1: linear, 2: linear, 3: linear}
    assert placed.router_layer == 1
    assert placed.passes_per_step == 1.0


@pytest.mark.parametrize(
    ("settings", "layers", "passes"),
    [
        ({"router_layer": 0}, {0, 1, 2, 3}, 1.0),
        ({"router_layer": 3}, {3}, 1.0),
        ({"router_layer": "last"}, {0, 1, 2, 3}, 2.0),
        ({"router_layer": 1, "layers_to_transform": [2, 3]}, {2, 3}, 1.0),
        ({"router_layer": 2, "layers_to_transform": [0, 3]}, {0, 3}, 1.5),
        ({"router_layer": 2, "layers_to_transform": 1}, {1}, 1.5),
    ],
)
def test_layers_to_transform_wins_and_decides_the_passes(settings, layers, passes):
    model = DyLoraMoE.from_base(tiny_base(), MoELoraConfig(r=2, target_modules="all-linear", **settings))
    assert adapted_layers(model) == layers
    assert model.passes_per_step == passes


def test_named_targets_stay_above_the_router_but_named_outer_modules_are_kept():
    config = MoELoraConfig(r=2, target_modules=["q_proj", "lm_head"], router_layer=2)
    model = DyLoraMoE.from_base(tiny_base(), config)
    paths = [layer.routing_name for layer in model.routed_layers]
    assert paths == ["model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.q_proj", "lm_head"]


def test_targets_that_match_nothing_name_what_there_is():
    base = tiny_base()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"target_modules=\['c_attn'\] matches no module") as caught:
        DyLoraMoE.from_base(base, MoELoraConfig(target_modules=["c_attn"]))
    assert "q_proj" in str(caught.value)
    assert_unchanged(base, before)


def test_expert_config_is_stock_peft_with_every_lora_field():
    config = MoELoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj"])
    expert = config.expert_config(r=7)
    assert type(expert) is LoraConfig
    assert (expert.r, expert.lora_alpha, expert.lora_dropout, expert.use_rslora) == (7, 5, 0.1, True)
    assert expert.target_modules == {"q_proj"}


def test_plain_values_make_the_same_config_again():
    config = MoELoraConfig(expert_names=["sql"], r=3, target_modules=["v_proj", "q_proj"], layers_to_transform=[1])
    plain = config.to_dict()
    assert plain["target_modules"] == ["q_proj", "v_proj"]
    assert MoELoraConfig(**plain) == config


def test_every_decoder_layer_can_hold_the_router():
    for k in range(LAYERS):
        assert MoELoraConfig(router_layer=k).resolve_router_layer(LAYERS) == k
