"""Ways of training (`train.method`): what each asks of a recipe, and the stages that it comes down to.

The table stands below the recipe's sections, because they refuse what does not go with a way before anything is loaded.
A way is added by a row in `METHODS` and the function of its stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dylora_moe.schema import choice


@dataclass(frozen=True)
class Stage:
    """One run of the trainer.

    Args:
        name: of its folder and its rows in the history.
        experts: those that train.
        router: whether the router trains; if not, every row is forced to the expert of its domain.
        domains: the experts whose data it sees.
        steps: optimizer steps; default what the recipe's `max_steps` or `num_train_epochs` say.
    """

    name: str
    experts: tuple[str, ...]
    router: bool
    domains: tuple[str, ...]
    steps: int | None = None


@dataclass(frozen=True)
class Roster:
    """What a way may know of a recipe's experts.

    Args:
        with_data: those that have data.
        free: those that may be trained.
        imported: whether some were trained before this recipe.
    """

    with_data: tuple[str, ...]
    free: tuple[str, ...]
    imported: bool

    @property
    def trained(self) -> tuple[str, ...]:
        """Those that have data and may be trained."""
        return tuple(name for name in self.with_data if name in self.free)


Exclusion = tuple[str, bool, str]
"""A key of the recipe, whether it cannot be used as it is, and why."""


@dataclass(frozen=True)
class Method:
    """A way of training.

    Args:
        stages: what it comes down to, in the order they run.
        exclusions: experts that it cannot work with.
        keys: of `train`, that are for this way only.
        needed: those of `keys` that must be given.
        beside: what to say of one of `keys` given with another way; `{key}`, `{value}` and `{method}` are filled in.
        without: what to say where one of `needed` is missing, likewise.
        trains_router: whether settings of the router are of use.
        counts_steps: whether its own keys give the steps, and not `max_steps`.
        side_by_side: whether its experts' stages may be trained at the same time, as jobs of their own.
    """

    stages: Callable[[Way, Roster], list[Stage]]
    exclusions: Callable[[Way, Roster], list[Exclusion]]
    keys: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    beside: str = ""
    without: str = ""
    trains_router: bool = True
    counts_steps: bool = False
    side_by_side: bool = False


def expert_stage(name: str, steps: int | None = None) -> Stage:
    """One expert alone on its own data."""
    return Stage(f"expert-{name}", (name,), False, (name,), steps)


def _joint(way: Way, experts: Roster) -> list[Stage]:
    return [Stage("joint", experts.free, True, experts.with_data)]


def _joint_exclusions(way: Way, experts: Roster) -> list[Exclusion]:
    reason = "none has data and may be trained. Give an expert `data`, or use `method: router`."
    return [("experts", not experts.trained, reason)]


def _staged(way: Way, experts: Roster) -> list[Stage]:
    stages = [expert_stage(name, way.expert_steps) for name in experts.trained]
    stages.append(Stage("router", (), True, experts.with_data, way.router_steps))
    if way.joint_steps is not None:
        stages.append(Stage("joint", experts.free, True, experts.with_data, way.joint_steps))
    return stages


def _staged_exclusions(way: Way, experts: Roster) -> list[Exclusion]:
    reason = "none has data and may be trained, so there is no first stage. Use `method: router`."
    return [("experts", not experts.trained, reason)]


def _router(way: Way, experts: Roster) -> list[Stage]:
    return [Stage("router", (), True, experts.with_data)]


def _router_exclusions(way: Way, experts: Roster) -> list[Exclusion]:
    return [
        (
            "train.method",
            not experts.with_data,
            "the router learns from examples. Give at least one expert `data`.",
        ),
        (
            "train.method",
            not experts.imported,
            "`method: router` leaves the experts as they are, and new ones do nothing yet. Give an expert an "
            "`adapter`, go on with a mixture (`start`), or use `method: staged`.",
        ),
    ]


def _expert(way: Way, experts: Roster) -> list[Stage]:
    assert way.expert is not None
    return [expert_stage(way.expert)]


def _expert_exclusions(way: Way, experts: Roster) -> list[Exclusion]:
    reason = "`method: expert` trains it, so it needs `data` and must not be frozen."
    return [(f"experts.{way.expert}", way.expert not in experts.trained, reason)]


_TOGETHER = "{key}={value!r} with `method: {method}`: `expert: NAME` and `method: expert` go together."

METHODS: dict[str, Method] = {
    "joint": Method(_joint, _joint_exclusions),
    "staged": Method(
        _staged,
        _staged_exclusions,
        keys=("expert_steps", "router_steps", "joint_steps"),
        needed=("expert_steps", "router_steps"),
        beside="{key} is for `method: staged`; with `{method}` set `max_steps`.",
        without="`method: staged` needs expert_steps and router_steps.",
        counts_steps=True,
        side_by_side=True,
    ),
    "router": Method(_router, _router_exclusions),
    "expert": Method(
        _expert,
        _expert_exclusions,
        keys=("expert",),
        needed=("expert",),
        beside=_TOGETHER,
        without=_TOGETHER,
        trains_router=False,
    ),
}
"""Name in recipes → way of training; the first is the default."""


@dataclass(frozen=True)
class Way:
    """The part of a recipe's `train` that says in which stages to train.

    Args:
        method: `joint` trains experts and router together on mixed data; `staged` first trains each expert by itself on
            its own examples, then the router with the experts frozen, then (with `joint_steps`) all together; `router`
            trains the router only, for experts from elsewhere; `expert` goes on training one expert, all else frozen.
        expert: which one (`method: expert`).
        expert_steps: optimizer steps of each expert's stage (`staged`).
        router_steps: of the router's stage (`staged`).
        joint_steps: of the closing joint stage (`staged`); default none.
    """

    method: str = choice(METHODS, "joint")
    expert: str | None = None
    expert_steps: int | None = None
    router_steps: int | None = None
    joint_steps: int | None = None

    def __post_init__(self):
        for name, method in METHODS.items():
            for key in method.keys:
                value = getattr(self, key)
                words = {"key": key, "value": value, "method": self.method}
                if name != self.method and value is not None:
                    raise ValueError(method.beside.format(**words))
                if name == self.method and value is None and key in method.needed:
                    raise ValueError(method.without.format(**words))
