"""The figures that a mixture must reach, and the runs that measure them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .settings import Settings
from .timing import Interval, ratio

COUNTS = (1, 2, 4, 8, 16, 32, 64)
PEERS = ("base", "base-again", "peft", "peft-wide", "loop", "passes", "xlora")

PLANS = {
    "counts": Settings(
        "train", "small", (8,), ("base", "peft", "loop", "dense", "auto", "auto-dropout"), batch=1, length=64, rounds=0
    ),
    "flops": Settings(
        "linear", "8b-layer", (8, 64), ("base", "dense", "grouped-top", "gathered-top", "auto-top"),
        batch=1, length=256, rounds=0, dtype="bfloat16", fake=True,
    ),
    "flops-training": Settings(
        "linear-train", "8b-layer", (8, 64), ("base", "dense", "grouped-top", "auto-top"),
        batch=1, length=256, rounds=0, dtype="bfloat16", fake=True,
    ),
    "saved": Settings(
        "train", "8b-layer", (8,), ("base", "peft", "peft-same-dtype", "loop", "dense", "auto"),
        batch=1, length=2048, rounds=0, dtype="bfloat16", fake=True,
    ),
    "graphs": Settings("prefill", "small", (8,), ("base", "peft", "auto", "auto-top"), rounds=0, graphs=True),
    "training": Settings("train", "medium", (8,), (*PEERS, "auto"), rounds=7, warmup=1),
    "specialists": Settings(
        "train", "small", (4, 64), ("base", "base-again", "peft", "by-row", "by-row-dense"), batch=8, rounds=7, warmup=1
    ),
    "experts": Settings(
        "train", "small", COUNTS, ("base", "base-again", "peft", "peft-wide", "auto", "auto-top"), rounds=5, warmup=1
    ),
    "experts-prefill": Settings(
        "prefill", "small", COUNTS, ("base", "base-again", "peft", "peft-wide", "auto", "auto-top")
    ),
    "top-1024": Settings(
        "linear", "medium", (8, 64),
        ("base", "base-again", "peft", "dense-top", "grouped-top", "gathered-top", "auto-top"),
        batch=1, length=256, rounds=31,
    ),
    "top-4096": Settings(
        "linear", "8b-layer", (8, 64),
        ("base", "base-again", "peft", "dense-top", "grouped-top", "gathered-top", "auto-top"),
        batch=1, length=256, rounds=31,
    ),
    "token-1024": Settings(
        "linear-token", "medium", (8, 64), ("base", "base-again", "peft", "dense-top", "gathered-top", "auto-top"),
        rounds=31,
    ),
    "generation": Settings(
        "decode", "smollm2", (8,),
        ("base", "base-again", "peft", "auto-top", "dense-top", "sequence", "sequence-fold", "forced", "forced-fold"),
        batch=1, length=64, new_tokens=64,
    ),
    "generation-peers": Settings(  # X-LoRA runs the whole text twice for every token
        "decode", "smollm2", (8,), ("base", "base-again", "peft", "xlora", "auto-top"),
        batch=1, length=64, new_tokens=16, rounds=3,
    ),
    **{  # as recipes place the experts: on layer L // 4 and above
        f"serving-{clients}": Settings(
            "serve", "smollm2", (8,),
            ("base", "engine-base", "engine", "engine-forced", "http-base", "http"),
            batch=clients, length=32, new_tokens=32, rank=8, router_layer=7, rounds=7, warmup=1,
        )
        for clients in (1, 8, 32)
    },
    "serving-experts": Settings(
        "serve", "smollm2", (32,), ("engine-base", "engine-forced", "engine-each"),
        batch=32, length=32, new_tokens=32, rank=8, router_layer=7, rounds=7, warmup=1,
    ),
    "serving-resident": Settings(
        "serve", "smollm2", (8, 256), ("engine",),
        batch=32, length=32, new_tokens=32, rank=8, router_layer=7, rounds=7, warmup=1,
    ),
    "gpu-prefill": Settings(
        "prefill", "8b-layer", (8,), ("base", "base-again", "peft", "peft-same-dtype", "loop", "auto", "auto-top"),
        batch=1, length=2048, layers=4, dtype="bfloat16", device="cuda", rounds=31,
    ),
    "gpu-training": Settings(
        "train", "8b-layer", (8,),
        ("base", "base-again", "peft", "peft-same-dtype", "peft-wide", "loop", "xlora", "auto"),
        batch=1, length=2048, layers=4, dtype="bfloat16", device="cuda", rounds=31,
    ),
}  # fmt: skip
PLANS = {name: replace(settings, plan=name) for name, settings in PLANS.items()}


@dataclass(frozen=True)
class Target:
    """One figure.

    Attributes:
        name: for the page; the heading of its cause in `causes.md`.
        plan: key of `PLANS`.
        metric: `time`, or a column of the rows.
        of: key of the variant.
        limit: the figure.
        against: key of the variant whose metric divides; None where the metric itself is the figure.
        at_least: the figure is a lower bound.
    """

    name: str
    plan: str
    metric: str
    of: str
    limit: float
    against: str | None = None
    at_least: bool = False


TARGETS = (
    Target("FLOPs over the floor, dense, E=8, forward", "flops", "over_floor", "dense/8", 1.005),
    Target("FLOPs over the floor, top-2 of 64, forward", "flops", "over_floor", "auto-top/64", 1.005),
    Target("FLOPs over the floor, dense, E=8, training", "flops-training", "over_floor", "dense/8", 1.005),
    Target("FLOPs over the floor, top-2 of 64, training", "flops-training", "over_floor", "auto-top/64", 1.005),
    Target("base passes", "counts", "base_passes", "auto/8", 1.0),
    Target("GEMMs added per adapted layer, dense form", "counts", "added_gemms", "dense/8", 2.0),
    Target("shrinks per decoder layer", "counts", "shrinks", "auto/8", 4.0),
    Target("saved bytes, against one bf16 PEFT adapter", "saved", "saved_in_layers", "auto/8", 1.05, "peft-same-dtype"),
    Target("saved bytes, against PEFT's default adapter", "saved", "saved_in_layers", "auto/8", 0.36, "peft"),
    Target("saved bytes, against the weighted loop", "saved", "saved_in_layers", "auto/8", 0.08, "loop/8"),
    Target("saved bytes, with dropout", "counts", "saved_bytes", "auto-dropout/8", 1.02, "auto/8"),
    Target("graph breaks", "graphs", "graph_breaks", "auto/8", 0.0),
    Target("training step, against PEFT of rank 8r", "training", "time", "auto/8", 1.05, "peft-wide/8"),
    Target("training step, the loop takes longer", "training", "time", "loop/8", 1.8, "auto/8", at_least=True),
    Target("training step, a pass per expert takes longer", "training", "time", "passes/8", 6.0, "auto/8", True),
    Target("training step, X-LoRA takes longer", "training", "time", "xlora/8", 2.0, "auto/8", at_least=True),
    Target("specialists step, E=4, against PEFT of rank r", "specialists", "time", "by-row/4", 1.10, "peft"),
    Target("specialists step, E=64, against PEFT of rank r", "specialists", "time", "by-row/64", 1.10, "peft"),
    Target("specialists step, E=4, saved bytes", "specialists", "saved_bytes", "by-row/4", 1.1, "peft"),
    Target("specialists step, E=64, saved bytes", "specialists", "saved_bytes", "by-row/64", 1.1, "peft"),
    Target("top-2 of 64, width 1024, against the base linear", "top-1024", "time", "auto-top/64", 1.30, "base"),
    Target("top-2 of 64, width 1024, against top-2 of 8", "top-1024", "time", "auto-top/64", 1.10, "auto-top/8"),
    Target("top-2 of 64, width 4096, against the base linear", "top-4096", "time", "auto-top/64", 1.30, "base"),
    Target("top-2 of 64, width 4096, against top-2 of 8", "top-4096", "time", "auto-top/64", 1.10, "auto-top/8"),
    Target("one token, top-2 of 64, against the base linear", "token-1024", "time", "auto-top/64", 1.5, "base"),
    Target("generation, routed per token", "generation", "time", "auto-top/8", 1.25, "base"),
    Target("generation, per sequence, folded", "generation", "time", "sequence-fold/8", 1.05, "base"),
    Target("generation, one expert forced, folded", "generation", "time", "forced-fold/8", 1.05, "base"),
    *(
        Target(f"{who}, {clients} clients, routed", f"serving-{clients}", "time", of, 1 / share, against)
        for clients, share in ((1, 0.80), (8, 0.80), (32, 0.90))
        for who, of, against in (
            ("engine", "engine/8", "engine-base/8"),
            ("server", "http/8", "http-base/8"),
        )
    ),
    Target("engine, 32 experts in one batch", "serving-experts", "time", "engine-each/32", 1.25, "engine-forced/32"),
    Target("engine, 256 experts resident", "serving-resident", "time", "engine/256", 1.25, "engine/8"),
    Target("GPU, prefill", "gpu-prefill", "time", "auto/8", 1.12, "base"),
    Target("GPU, training step", "gpu-training", "time", "auto/8", 1.15, "base"),
    Target("GPU, peak memory of a training step", "gpu-training", "peak_bytes", "auto/8", 1.05, "peft-same-dtype"),
)


@dataclass(frozen=True)
class Outcome:
    """A target beside what was measured; `value` is None where that variant did not run, for the reason `missing`."""

    target: Target
    value: float | None
    interval: Interval | None = None
    missing: str | None = None

    @property
    def met(self) -> bool | None:
        """Whether the figure is reached."""
        if self.value is None:
            return None
        return self.value >= self.target.limit if self.target.at_least else self.value <= self.target.limit

    @property
    def gap(self) -> float:
        """How far off the figure is, as a share of it (of the whole where the figure is 0)."""
        assert self.value is not None
        off = self.target.limit - self.value if self.target.at_least else self.value - self.target.limit
        return max(0.0, off / (self.target.limit or 1.0))


def outcome(target: Target, results: Mapping[str, Any]) -> Outcome:
    """What the results of the target's plan say."""
    rows = {row["key"]: row for row in results["rows"]}
    for key in (target.of, target.against):
        if key is not None and key not in rows:
            return Outcome(target, None, missing=results["missing"].get(key, "left out of the run"))
    row, other = rows[target.of], rows.get(target.against or "")
    if target.metric == "time":
        if "seconds" not in row:
            return Outcome(target, None, missing="not timed")
        assert other is not None
        interval = ratio(row["seconds"], other["seconds"], results["settings"]["seed"])
        return Outcome(target, interval.median, interval)
    value = row.get(target.metric)
    if value is None:
        return Outcome(target, None, missing="not counted")
    return Outcome(target, value / other[target.metric] if other else value)


def is_plan(settings: Settings, plan: str) -> bool:
    """Whether `settings` measure what the plan does; rounds, seed and threads are free."""
    free = {"seed": 0, "threads": 0, "rounds": 0, "warmup": 0, "plan": plan}
    same = replace(settings, **free) == replace(PLANS[plan], **free)
    return same and bool(settings.rounds) == bool(PLANS[plan].rounds)
