"""What an export's config.json may say, and what a hostile one may not."""

import json
from typing import Any

import pytest

from dylora_moe_vllm.settings import MAX_RANK, Carried, SettingsError, parse
from plugin_section import section


def test_reads_all():
    settings = parse(section(route_to_base=True, top_k=4, closed=[1]))
    assert settings.experts == ("red", "green", "blue")
    assert settings.outputs == 4
    assert settings.modules == {"model.layers.1.self_attn.q_proj": (Carried(0, 4, 2.0), Carried(2, 8, 0.5))}
    assert settings.selectors["half"] == (0.5, 0.5, 0.0)
    assert settings.closed == (1,)


def test_router_hidden_size_belongs_to_mlp():
    linear = section(router_type="linear")
    assert parse(linear).router_hidden_size is None


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_other_version_is_one_line(version: Any):
    with pytest.raises(SettingsError, match=r"version=.*reads version 1; install") as caught:
        parse(section(version=version))
    assert "\n" not in str(caught.value)


MODULE = "model.layers.1.self_attn.q_proj"
NAN, INFINITY = json.loads("NaN"), json.loads("Infinity")
WRONG: list[tuple[str, Any, str]] = [
    ("experts", [], "experts"),
    ("experts", "red", "experts='red'"),
    ("experts", ["red", "red", "blue"], r"experts\[1\]='red'"),
    ("experts", ["red", "../../etc", "blue"], r"experts\[1\]='../../etc'"),
    ("experts", ["red", "base", "blue"], r"experts\[1\]='base'"),
    ("experts", ["red", 3, "blue"], r"experts\[1\]=3"),
    ("experts", ["e"] * 10**6, "1 to 1024 names"),
    ("layers", 0, "layers=0"),
    ("layers", 10**12, "layers=1000000000000"),
    ("layers", 4.0, "layers=4.0"),
    ("router_layer", 4, "router_layer=4: expected a whole number from 0 to 3"),
    ("router_layer", -1, "router_layer=-1"),
    ("router_layer", True, "router_layer=True"),
    ("router_layer", "last", "router_layer='last'"),
    ("router_type", "__class__", "router_type='__class__'"),
    ("router_type", ["mlp"], "router_type"),
    ("router_hidden_size", 10**9, "router_hidden_size=1000000000"),
    ("router_hidden_size", None, "router_hidden_size=None"),
    ("route_to_base", 1, "route_to_base=1"),
    ("granularity", "sequence", "granularity='sequence'"),
    ("temperature", 0, "temperature=0"),
    ("temperature", NAN, "temperature=nan: expected a finite number"),
    ("temperature", INFINITY, "temperature=inf"),
    ("temperature", 10**400, "temperature=1000"),
    ("temperature", "1", "temperature='1'"),
    ("top_k", 0, "top_k=0"),
    ("top_k", 4, "top_k=4"),
    ("closed", [0, 0], r"closed=\[0, 0\]"),
    ("closed", [3], r"closed\[0\]=3"),
    ("closed", [0, 1, 2], "at least one expert"),
    ("modules", {}, "modules"),
    ("modules", [MODULE], "modules"),
    ("modules", {"../x": [[0, 4, 1.0]]}, "modules='../x'"),
    ("modules", {"a" * 600: [[0, 4, 1.0]]}, "modules='aaa"),
    ("modules", {MODULE: []}, "triples"),
    ("modules", {MODULE: [[0, 4]]}, "column, rank and scaling"),
    ("modules", {MODULE: [[3, 4, 1.0]]}, "column=3"),
    ("modules", {MODULE: [[0, 4, 1.0], [0, 4, 1.0]]}, "every expert once"),
    ("modules", {MODULE: [[0, MAX_RANK + 1, 1.0]]}, f"rank={MAX_RANK + 1}"),
    ("modules", {MODULE: [[0, 10**15, 1.0]]}, "rank=1000000000000000"),
    ("modules", {MODULE: [[0, 4, NAN]]}, "scaling=nan"),
    ("selectors", {"../../x": [1, 0, 0]}, "selectors='../../x'"),
    ("selectors", {"a/b": [1, 0, 0]}, "selectors='a/b'"),
    ("selectors", {"half": [1, 0]}, "3 weights"),
    ("selectors", {"half": [NAN, 0, 0]}, "nan"),
    ("selectors", {"half": [1e30, 0, 0]}, r"1e\+30"),
    ("selectors", {"red": [0, 1, 0]}, "as 'red' is the name of what it forces"),
    ("selectors", {"base": [0, 1, 0]}, "as 'base' is the name of what it forces"),
    ("selectors", None, "selectors=None"),
    ("tempreature", 1.0, "'tempreature' is unknown; meant: temperature"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[f"{key}-{i}" for i, (key, *_) in enumerate(WRONG)])
def test_wrong_value_is_named(key: str, value: Any, message: str):
    with pytest.raises(SettingsError, match=message) as caught:
        parse(section(**{key: value}))
    assert len(str(caught.value)) < 400


def test_ranks_of_a_module_are_bounded_in_all():
    names = [f"e{i}" for i in range(9)]
    carried = {MODULE: [[i, MAX_RANK, 1.0] for i in range(9)]}
    with pytest.raises(SettingsError, match="ranks=9216: expected at most 8192"):
        parse(section(experts=names, modules=carried, selectors={}))


@pytest.mark.parametrize("key", [key for key in section() if key != "version"])
def test_every_key_is_needed(key: str):
    given = section()
    del given[key]
    with pytest.raises(SettingsError, match=f"dylora_moe.{key}=None"):
        parse(given)


@pytest.mark.parametrize("given", [None, [], "section", 3])
def test_no_section(given: Any):
    with pytest.raises(SettingsError, match="export the mixture again"):
        parse(given)
