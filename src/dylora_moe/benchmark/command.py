"""`dylora-moe bench`."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dylora_moe.failures import Verbose


def _list(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text is not None else None


def _numbers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in _list(text) or ())
    except ValueError:
        raise ValueError(f"experts={text!r}: whole numbers separated by commas are needed, e.g. 1,8,64.") from None


def bench(
    plan: Annotated[
        str | None,
        typer.Option(
            help="Measure figures of the results page; `--list` shows the plans. What several begin with runs all."
        ),
    ] = None,
    work: Annotated[
        str | None,
        typer.Option(help="train, prefill, decode, serve, or one layer: linear, linear-train, linear-token."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="tiny, small (12 × 576), medium (8 × 1024), 8b-layer (1 × 4096) or smollm2.")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="Numbers of experts, e.g. 1,8,64; all in one run.")] = None,
    variants: Annotated[str | None, typer.Option(help="What to compare, e.g. base,peft,auto; see `--list`.")] = None,
    against: Annotated[str | None, typer.Option(help="Also compare the times with these, e.g. peft-wide/8.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows. [default: 4]")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row, or per prompt. [default: 128]")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="To generate per row (decode). [default: 32]")] = None,
    rank: Annotated[int | None, typer.Option(help="Of one expert. [default: 16]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token of the sparse variants. [default: 2]")] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers, if not the shape's own.")] = None,
    router_layer: Annotated[
        int | None, typer.Option(help="Adapters sit on this decoder layer and above. [default: 0]")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Timed rounds; 0 counts only. [default: 11]")] = None,
    warmup: Annotated[int | None, typer.Option(help="Rounds before them. [default: 2]")] = None,
    repeats: Annotated[int | None, typer.Option(help="Calls per timing; 0 chooses. [default: 0]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, inputs, order and bootstrap.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch; 0 leaves its choice.")] = None,
    fake: Annotated[
        bool | None, typer.Option("--fake", help="Count on tensors without storage (needs --rounds 0).")
    ] = None,
    graphs: Annotated[
        bool | None, typer.Option("--graphs", "--compile", help="Count graph breaks (torch._dynamo).")
    ] = None,
    output: Annotated[Path, typer.Option(help="Results go to OUTPUT/<date>-<machine>.")] = Path("benchmarks/results"),
    page: Annotated[Path | None, typer.Option(help="Only write the page of this results folder again.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List plans and variants, and stop.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure a mixture beside its base and its peers.

    One process, the same weights for all; the variants take turns in a random order in every round. Reported are the
    medians of the per-round ratios to the bare base with a 95 % interval, and what can be counted: FLOPs, saved bytes,
    peak, GEMMs, base passes. The bare base takes part twice: how far the second is from 1 is the noise.

    Every figure has a plan: [bold]dylora-moe bench --list[/], then [bold]dylora-moe bench --plan training[/]. Runs of a
    day and a machine gather on one page. Why a figure is missed goes into causes.md beside it, under a heading with
    the figure's name; [bold]dylora-moe bench --page FOLDER[/] writes the page again.

    Example: [bold]dylora-moe bench --work train --experts 1,8,32 --variants base,peft,peft-wide,loop,auto[/]
    """
    from rich.console import Console

    from .settings import Settings
    from .targets import PLANS, is_plan

    console = Console()
    if show:
        for table in _lists():
            console.print(table)
        return
    if page is not None:
        from .page import write_page

        console.print(str(write_page(page)), markup=False, highlight=False, soft_wrap=True)
        return
    plans = [plan] if plan is None or plan in PLANS else [name for name in PLANS if name.startswith(f"{plan}-")]
    if not plans:
        raise ValueError(f"plan={plan!r}: choose one of {', '.join(PLANS)}, or what several begin with.")
    asked: dict[str, Any] = {
        "work": work,
        "shape": shape,
        "experts": _numbers(experts),
        "variants": _list(variants),
        "batch": batch,
        "length": length,
        "new_tokens": new_tokens,
        "rank": rank,
        "top_k": top_k,
        "layers": layers,
        "router_layer": router_layer,
        "rounds": rounds,
        "warmup": warmup,
        "repeats": repeats,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "threads": threads,
        "fake": fake,
        "graphs": graphs,
    }
    given = {key: value for key, value in asked.items() if value is not None}
    for name in plans:
        settings = replace(PLANS[name] if name else Settings(), **given)
        fitting = next((other for other in PLANS if is_plan(settings, other)), None)
        _measure(replace(settings, plan=fitting), _list(against) or (), output, console)


def _measure(settings: Any, against: tuple[str, ...], output: Path, console: Any) -> None:
    from .columns import cells
    from .page import add_run, folder_for
    from .run import run

    timed_keys = settings.keys if settings.rounds else []
    unknown = [key for key in against if key not in timed_keys]
    if unknown:
        has = f"which has {', '.join(timed_keys)}" if timed_keys else "which times nothing (--rounds 0)"
        raise ValueError(f"against={','.join(unknown)!r}: not a timed variant of this run, {has}.")
    output.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    with console.status("building the models") as status:
        results = run(settings, status.update)
    written = add_run(results, folder_for(results, output, datetime.date.today()))
    headings, rows = cells(results, against)
    timed = [i for i, heading in enumerate(headings) if heading.startswith("time") or heading in ("ms", "tokens/s")]
    counted = [i for i in range(1, len(headings)) if i not in timed]
    for title, columns in (("Time", timed), ("Counts", counted)):
        if columns:
            picked = [[row[i] for i in (0, *columns)] for row in rows]
            console.print(_table(f"{title}: {settings.name}", [headings[i] for i in (0, *columns)], picked))
    for key, reason in results["missing"].items():
        console.print(f"{key}: {reason}", markup=False, highlight=False)
    console.print(f"{results['command']}\n{written}", markup=False, highlight=False, soft_wrap=True)


def _table(title: str, headings: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _lists() -> list[Any]:
    from .kinds import KINDS
    from .targets import PLANS, TARGETS

    plans = []
    for name, settings in PLANS.items():
        figures = [target.name for target in TARGETS if target.plan == name]
        plans.append([name, settings.command(), "\n".join(figures)])
    kinds = [
        [key, kind.title.format(r="r", R="r·E", E="E", k="k"), ", ".join(kind.works)] for key, kind in KINDS.items()
    ]
    return [
        _table("Plans", ["plan", "the same as", "figures"], plans),
        _table("Variants", ["key", "what it is", "works"], kinds),
    ]
