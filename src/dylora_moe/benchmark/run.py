"""One run: build the variants, count, time, and put it into plain values."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import counts, timing
from .kinds import KINDS, SERVE
from .machine import describe
from .models import Models
from .runners import runner_of, runners
from .settings import Settings
from .work import Runner

FORMAT_VERSION = 1
COUNTED_TOKENS = 8  # of a generation: counting is slow, and every further token is like the last (folding comes before)
Progress = Callable[[str], None]


def run(settings: Settings, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Count and time every variant.

    Args:
        settings: what to measure.
        progress: is told in words what happens.

    Returns:
        `settings`, `command`, `machine`, `seconds` in all, `missing` (variant → why it does not run) and `rows`: per
        variant its counts and, unless `settings.rounds` is 0, `seconds` by round, `ratio` to the bare base and
        `tokens_per_second`.

    Raises:
        ValueError: settings that do not fit each other or the base.
    """
    if settings.work == SERVE and not settings.rounds:
        raise ValueError("work='serve' is timed and has nothing to count: give it rounds.")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _threads(settings.threads):
        models = Models(settings, Path(folder))
        made, missing = runners(settings, models)
        few = replace(settings, new_tokens=min(settings.new_tokens, COUNTED_TOKENS))
        if settings.work == SERVE:
            rows = [{"key": runner.key, "title": runner.title, "experts": runner.experts} for runner in made]
        else:
            with models.running():
                rows = count(few, models, made if few == settings else runners(few, models)[0], progress)
        if settings.rounds:
            add_times(settings, made, rows, progress)
        machine = describe(settings.device)
    return {
        "format_version": FORMAT_VERSION,
        "settings": settings.to_dict(),
        "command": settings.command(),
        "machine": machine,
        "seconds": round(time.perf_counter() - started, 1),
        "missing": missing,
        "rows": rows,
    }


def count(
    settings: Settings, models: Models, made: list[Runner], progress: Progress = lambda _: None
) -> list[dict[str, Any]]:
    """What does not depend on timing, a row per variant; of a generation, for its first tokens only."""
    widths = {models.base.get_submodule(path).in_features for path in models.targets}
    rows, base = [], None
    for runner in made:
        progress(f"counting {runner.title}")
        found = counts.gemms(runner)
        if base is None:
            base = (
                found
                if runner.key == "base"
                else counts.gemms(runner_of(settings, models, "base", KINDS["base"], None))
            )
        row: dict[str, Any] = {
            "key": runner.key,
            "title": runner.title,
            "experts": runner.experts,
            "flops": counts.flops(runner),
            "base_passes": counts.base_passes(runner),
            "added_gemms": counts.added_gemms(found, base, runner.adapted),
            "shrinks": counts.shrinks(found, base, _ranks(settings, runner), widths),
        }
        if models.training:
            row["saved_bytes"] = counts.saved(runner)
            row["saved_in_layers"] = counts.saved(runner, in_layers=True)
        if not settings.fake:
            row["peak_bytes"] = counts.peak_bytes(runner)
        if settings.graphs:
            row["graph_breaks"] = counts.graph_breaks(runner)
        if settings.work.startswith("linear"):
            width = models.base.config.hidden_size
            row["flops_floor"] = counts.floor(settings.work, _active_rank(settings, runner), (width, width))
        rows.append(row)
    if rows and rows[0]["key"] == "base":
        for row in rows:
            row["flops_ratio"] = row["flops"] / rows[0]["flops"]
            if "flops_floor" in row:
                row["over_floor"] = row["flops_ratio"] / row["flops_floor"]
    return rows


def add_times(settings: Settings, made: list[Runner], rows: list[dict[str, Any]], progress: Progress) -> None:
    """Time the variants and write the results into their rows."""
    repeats = settings.repeats or (0 if settings.work.startswith("linear") else 1)
    tell = lambda done, of: progress(f"round {done} of {of}")  # noqa: E731
    by_key = {runner.key: runner for runner in made}
    times = timing.interleaved(
        {key: runner.step for key, runner in by_key.items()},
        settings.rounds,
        settings.warmup,
        seed=settings.seed,
        repeats=repeats,
        device=settings.device,
        around=lambda key: by_key[key].in_force(),
        progress=tell,
    )
    tokens = tokens_of(settings)
    for row in rows:
        seconds = times[row["key"]]
        middle = timing.bootstrap(seconds, settings.seed)
        row["seconds"] = seconds
        row["tokens_per_second"] = tokens / middle.median
        if "base" in times:
            row["ratio"] = list(timing.ratio(seconds, times["base"], settings.seed))


def tokens_of(settings: Settings) -> int:
    """Tokens that one step processes; those that it generates when decoding."""
    if settings.work == "linear-token":
        return 1
    return settings.batch * (settings.new_tokens if settings.work in ("decode", SERVE) else settings.length)


def _active_rank(settings: Settings, runner: Runner) -> int:
    """ΣR that a token needs: of its k experts where the weights are sparse."""
    kind = KINDS[runner.key.partition("/")[0]]
    if kind.family == "base":
        return 0
    if kind.family == "peft":
        return settings.rank * (runner.experts or 1)
    return settings.rank * (settings.top_k if kind.sparse else runner.experts or 1)


def _ranks(settings: Settings, runner: Runner) -> set[int]:
    active = _active_rank(settings, runner)
    return {settings.rank, active, settings.rank * (runner.experts or 1)} - {0}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
