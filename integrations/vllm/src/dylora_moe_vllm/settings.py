"""The section `dylora_moe` of a mixture's config.json: read strictly, since whoever wrote it may mean harm.

Nothing is allocated, opened or computed before all of it was checked; what is wrong is one `SettingsError` that names
the value, what was expected and the remedy.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

FORMAT_VERSION = 1
BASE = "base"
ROUTER_TYPES = ("mlp", "linear", "closed_form")
GRANULARITIES = ("token", "prefix")

MAX_EXPERTS = 1024
MAX_LAYERS = 4096
MAX_MODULES = 100_000
MAX_RANK = 1024
"""The largest rank of one expert."""
MAX_ROWS = 8192
"""The largest sum of ranks in one module."""
MAX_ROUTER_HIDDEN_SIZE = 65_536

_EXPERT = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,127}")
_SELECTOR = re.compile(r"[A-Za-z][A-Za-z0-9_+.-]{0,127}")
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+){0,31}")


class SettingsError(ValueError):
    """A mixture's config.json that the plugin does not serve."""


class Carried(NamedTuple):
    """One expert of one module: its column among the experts, its rank and its scaling."""

    column: int
    rank: int
    scaling: float


@dataclass(frozen=True)
class Settings:
    """A mixture as its config.json says, checked.

    Attributes:
        experts: names, in the order of the columns.
        layers: L, decoder layers of the base.
        router_layer: k, the decoder layer whose input is scored.
        router_type: of `ROUTER_TYPES`.
        router_hidden_size: H_r for `"mlp"`, else None.
        route_to_base: whether the last output stands for the base.
        granularity: of `GRANULARITIES`.
        temperature: the scores are divided by it.
        top_k: outputs that get a share, 1 to `outputs`.
        closed: columns that get none.
        modules: path in the Hugging Face model → its experts, in the order of their rows.
        selectors: name → one routing weight per expert.
    """

    experts: tuple[str, ...]
    layers: int
    router_layer: int
    router_type: str
    router_hidden_size: int | None
    route_to_base: bool
    granularity: str
    temperature: float
    top_k: int
    closed: tuple[int, ...]
    modules: Mapping[str, tuple[Carried, ...]]
    selectors: Mapping[str, tuple[float, ...]]

    @property
    def outputs(self) -> int:
        """n: the router's outputs, experts and base route."""
        return len(self.experts) + self.route_to_base


def parse(section: Any) -> Settings:
    """Check the section and return it as `Settings`.

    Args:
        section: what json made of it; anything.

    Raises:
        SettingsError: it is of another format version, incomplete, or a value is of the wrong type or out of range.
    """
    if not isinstance(section, dict):
        raise SettingsError(
            f"config.json: dylora_moe={_shown(section)}: expected the section that `dylora-moe export DIR --to vllm "
            "OUT` writes; export the mixture again."
        )
    if type(version := section.get("version")) is not int or version != FORMAT_VERSION:
        raise SettingsError(
            f"config.json: dylora_moe.version={_shown(version)}: this plugin reads version {FORMAT_VERSION}; install "
            "the dylora-moe-vllm that belongs to the dylora-moe that exported the folder, or export it again."
        )
    known = {"version", *Settings.__dataclass_fields__}
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise SettingsError(
                f"config.json: dylora_moe.{str(key)[:80]!r} is unknown" + (f"; meant: {near[0]}?" if near else ".")
            )
    read = _Reader(section)
    experts = read.names("experts")
    layers = read.integer("layers", 1, MAX_LAYERS)
    router_layer = read.integer("router_layer", 0, layers - 1)
    router_type = read.choice("router_type", ROUTER_TYPES)
    width = read.integer("router_hidden_size", 1, MAX_ROUTER_HIDDEN_SIZE) if router_type == "mlp" else None
    route_to_base = read.flag("route_to_base")
    outputs = len(experts) + route_to_base
    closed = read.columns("closed", len(experts))
    if len(closed) == outputs:
        raise read.wrong("closed", list(closed), "at least one expert that may be routed to; train the router first")
    return Settings(
        experts=experts,
        layers=layers,
        router_layer=router_layer,
        router_type=router_type,
        router_hidden_size=width,
        route_to_base=route_to_base,
        granularity=read.choice("granularity", GRANULARITIES),
        temperature=read.number("temperature", lambda value: 1e-6 <= value <= 1e6, "between 1e-6 and 1e6"),
        top_k=read.integer("top_k", 1, outputs),
        closed=closed,
        modules=read.modules(len(experts)),
        selectors=read.selectors(experts),
    )


class _Reader:
    """Reads one value after the other, each with its type and range."""

    def __init__(self, section: dict[Any, Any]):
        self._section = section

    def wrong(self, where: str, value: Any, expected: str) -> SettingsError:
        return SettingsError(f"config.json: dylora_moe.{where}={_shown(value)}: expected {expected}.")

    def integer(self, key: str, least: int, most: int) -> int:
        return self._integer(key, self._section.get(key), least, most)

    def _integer(self, where: str, value: Any, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(where, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, allowed: Callable[[float], bool], expected: str) -> float:
        return self._number(key, self._section.get(key), allowed, expected)

    def _number(self, where: str, value: Any, allowed: Callable[[float], bool], expected: str) -> float:
        if type(value) not in (int, float) or not abs(value) < math.inf or not allowed(value):
            raise self.wrong(where, value, f"a finite number {expected}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._section.get(key)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self._section.get(key)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, value, f"one of {', '.join(choices)}; others cannot be served by vLLM")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self._section.get(key)
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_EXPERTS:
            raise self.wrong(key, value, f"a list of 1 to {MAX_EXPERTS} names of experts")
        for at, name in enumerate(value):
            if not isinstance(name, str) or not _EXPERT.fullmatch(name) or name == BASE or name in value[:at]:
                raise self.wrong(f"{key}[{at}]", name, f"a name of letters, digits, _ and -, once, and not {BASE!r}")
        return tuple(value)

    def columns(self, key: str, experts: int) -> tuple[int, ...]:
        value = self._section.get(key)
        if not isinstance(value, list) or len(value) > experts:
            raise self.wrong(key, value, "a list of columns of experts")
        found = tuple(self._integer(f"{key}[{at}]", column, 0, experts - 1) for at, column in enumerate(value))
        if len(set(found)) < len(found):
            raise self.wrong(key, value, "every column once")
        return found

    def modules(self, experts: int) -> dict[str, tuple[Carried, ...]]:
        value = self._section.get("modules")
        if not isinstance(value, dict) or not 1 <= len(value) <= MAX_MODULES:
            raise self.wrong("modules", value, f"1 to {MAX_MODULES} modules by their paths")
        found = {}
        for path, carried in value.items():
            if not isinstance(path, str) or len(path) > 512 or not _MODULE.fullmatch(path):
                raise self.wrong("modules", path, "the path of a module, as model.layers.8.self_attn.q_proj")
            found[path] = self._carried(f"modules[{path}]", carried, experts)
        return found

    def _carried(self, where: str, value: Any, experts: int) -> tuple[Carried, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= experts:
            raise self.wrong(where, value, f"1 to {experts} triples of column, rank and scaling")
        found = []
        for triple in value:
            if not isinstance(triple, list) or len(triple) != 3:
                raise self.wrong(where, triple, "column, rank and scaling")
            column, rank, scaling = triple
            found.append(
                Carried(
                    self._integer(f"{where}: column", column, 0, experts - 1),
                    self._integer(f"{where}: rank", rank, 1, MAX_RANK),
                    self._number(f"{where}: scaling", scaling, lambda s: abs(s) <= 1e6, "from -1e6 to 1e6"),
                )
            )
        if len({one.column for one in found}) < len(found):
            raise self.wrong(where, value, "every expert once")
        if (rows := sum(one.rank for one in found)) > MAX_ROWS:
            raise self.wrong(f"{where}: ranks", rows, f"at most {MAX_ROWS} in all")
        return tuple(found)

    def selectors(self, experts: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
        value = self._section.get("selectors")
        if not isinstance(value, dict) or len(value) > MAX_EXPERTS + len(experts) + 1:
            raise self.wrong("selectors", value, "the routing weights of each selector by its name")
        forced = {name: tuple(float(name == other) for other in experts) for name in (*experts, BASE)}
        found = {}
        for name, weights in value.items():
            if not isinstance(name, str) or not _SELECTOR.fullmatch(name):
                raise self.wrong("selectors", name, "a name of letters, digits, _, +, . and -")
            where = f"selectors[{name}]"
            if not isinstance(weights, list) or len(weights) != len(experts):
                raise self.wrong(where, weights, f"{len(experts)} weights, one per expert")
            found[name] = tuple(self._number(where, w, lambda w: abs(w) <= 1e4, "from -1e4 to 1e4") for w in weights)
            if found[name] != forced.get(name, found[name]):
                raise self.wrong(where, weights, f"{list(forced[name])}, as {name!r} is the name of what it forces")
        return found


def _shown(value: Any) -> str:
    """A value as a message may show it: short, whatever it is."""
    text = repr(value) if isinstance(value, str | int | float | bool | list | type(None)) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
