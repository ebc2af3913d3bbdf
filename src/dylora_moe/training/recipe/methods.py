"""Ways of training (`train.method`): what each asks of a recipe, and the stages that it comes down to.

The table stands below the recipe's sections, because they refuse what does not go with a way before anything is loaded.
A way is added by a row in `METHODS` and the function of its stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
        fits: the router is computed from the examples, without a step.
    """

    name: str
    experts: tuple[str, ...]
    router: bool
    domains: tuple[str, ...]
    steps: int | None = None
    fits: bool = False

    @property
    def by_steps(self) -> bool:
        """Whether the router learns by gradient steps."""
        return self.router and not self.fits


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
        beside: what to say of one of `keys` given with another way; `{key}`, `{value}`, `{method}` and the ways that
            have it, `{ways}`, are filled in.
        without: what to say where one of `needed` is missing, likewise.
        trains_router: whether settings of the router are of use.
        counts_steps: whether its own keys give the steps, and not `max_steps`.
        ends_in_router: whether the router follows the experts, trained or in closed form (`router`).
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
    ends_in_router: bool = False
    side_by_side: bool = False


def expert_stage(name: str, steps: int | None = None) -> Stage:
    """One expert alone on its own data."""
    return Stage(f"expert-{name}", (name,), False, (name,), steps)


def _joint(way: Way, experts: Roster) -> list[Stage]:
    return [Stage("joint", experts.free, True, experts.with_data)]


def _joint_exclusions(way: Way, experts: Roster) -> list[Exclusion]:
    reason = "none has data and may be trained. Give an expert `data`, or use `method: router`."
    return [("experts", not experts.trained, reason)]


def _router_after(way: Way, experts: Roster) -> Stage:
    """The router of experts that are trained."""
    if way.closed_form:
        return Stage("fit", (), True, experts.with_data, fits=True)
    return Stage("router", (), True, experts.with_data, way.router_steps)


def _specialists(way: Way, experts: Roster) -> list[Stage]:
    return [Stage("specialists", experts.trained, False, experts.trained), _router_after(way, experts)]


def _specialists_exclusions(way: Way, experts: Roster) -> list[Exclusion]:
    reason = "none has data and may be trained. Give an expert `data`, or use `method: router`."
    return [("experts", not experts.trained, reason)]


def _staged(way: Way, experts: Roster) -> list[Stage]:
    stages = [expert_stage(name, way.expert_steps) for name in experts.trained]
    stages.append(_router_after(way, experts))
    if way.joint_steps is not None:
        stages.append(Stage("joint", experts.free, True, experts.with_data, way.joint_steps))
    return stages


def _staged_exclusions(way: Way, experts: Roster) -> list[Exclusion]:
    reason = "none has data and may be trained, so there is no first stage. Use `method: router`."
    joint = "a router in closed form is not trained with the experts. Leave it out, or set `router: trained`."
    return [
        ("experts", not experts.trained, reason),
        ("train.joint_steps", way.closed_form and way.joint_steps is not None, joint),
    ]


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
    "specialists": Method(
        _specialists,
        _specialists_exclusions,
        keys=("router", "router_steps"),
        beside="{key} is for `method: {ways}`; with `{method}` set `max_steps`.",
        ends_in_router=True,
    ),
    "staged": Method(
        _staged,
        _staged_exclusions,
        keys=("expert_steps", "router_steps", "joint_steps", "router"),
        needed=("expert_steps",),
        beside="{key} is for `method: {ways}`; with `{method}` set `max_steps`.",
        without="`method: staged` needs expert_steps, and router_steps where the router is trained.",
        counts_steps=True,
        ends_in_router=True,
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
        method: `joint` trains experts and router together on mixed data; `specialists` trains every row's own expert on
            mixed data, in batches of all domains, and then the router; `staged` first trains each expert by itself on
            its own examples, then the router with the experts frozen, then (with `joint_steps`) all together; `router`
            trains the router only, for experts from elsewhere; `expert` goes on training one expert, all else frozen.
        expert: which one (`method: expert`).
        expert_steps: optimizer steps of each expert's stage (`staged`).
        router: how the router follows the experts (`specialists`, `staged`): `closed_form` computes it from their
            examples, `trained` trains it; default `trained` where `router_steps` are given.
        router_steps: of the router's stage (`router: trained`).
        joint_steps: of the closing joint stage (`staged`); default none.
    """

    method: str = choice(METHODS, "joint")
    expert: str | None = None
    expert_steps: int | None = None
    router: Literal["trained", "closed_form"] | None = None
    router_steps: int | None = None
    joint_steps: int | None = None

    @property
    def closed_form(self) -> bool:
        """Whether the router is computed, not trained."""
        return self.router == "closed_form"

    def __post_init__(self):
        own = METHODS[self.method]
        for method in METHODS.values():
            for key in method.keys:
                value, ways = getattr(self, key), [name for name, other in METHODS.items() if key in other.keys]
                words = {"key": key, "value": value, "method": self.method, "ways": " or ".join(ways)}
                if key not in own.keys and value is not None:
                    raise ValueError(method.beside.format(**words))
                if method is own and value is None and key in method.needed:
                    raise ValueError(method.without.format(**words))
        if own.ends_in_router:
            if self.router is None:
                object.__setattr__(self, "router", "closed_form" if self.router_steps is None else "trained")
            if self.closed_form and self.router_steps is not None:
                raise ValueError(
                    f"router_steps={self.router_steps} with `router: closed_form`, which takes no steps; leave one out."
                )
            if not self.closed_form and self.router_steps is None:
                raise ValueError("`router: trained` needs router_steps, the optimizer steps of its stage.")
