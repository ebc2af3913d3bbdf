"""`dylora-moe export`: an expert, a fixed mixture, or the whole mixture, as others read it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dylora_moe.failures import Verbose
from dylora_moe.keeping import Base, Directory, say, session_on

if TYPE_CHECKING:  # whatever needs torch is imported by the command that uses it: help answers at once
    from dylora_moe.model import DyLoraMoE


class To(StrEnum):
    """What is written."""

    PEFT = "peft"
    MERGED = "merged"
    VLLM = "vllm"
    VLLM_LORA = "vllm-lora"


def export(
    directory: Directory,
    names: Annotated[list[str], typer.Argument(metavar="[NAME] OUT", help="The expert, if one; the folder to be.")],
    to: Annotated[To, typer.Option(help="What is written.")] = To.PEFT,
    mixture: Annotated[
        list[str] | None, typer.Option(metavar="NAME=EXPERT:WEIGHT,…", help="A fixed mixture; may be repeated.")
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="With --to vllm: token or prefix, instead of the mixture's own.")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="With --to vllm: copy the base's weights, not link them.")
    ] = False,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Write an expert or a fixed mixture as an adapter or a plain model, or the whole mixture for vLLM.

    [bold]peft[/] (the default) writes one expert as a stock adapter, which `PeftModel.from_pretrained` loads;
    [bold]merged[/] the base with it in its weights; both take an expert's NAME or one --mixture. [bold]vllm[/] writes
    all of it, routed token by token by the plugin dylora-moe-vllm; [bold]vllm-lora[/] every expert as a stock adapter
    for vLLM as it is. Those take no NAME, and each --mixture is one more that a request can name.

    Example: [bold]dylora-moe export runs/mine sql adapters/sql[/]

    Example: [bold]dylora-moe export runs/mine served --to vllm --mixture half=sql:0.5,math:0.5[/]
    """
    if len(names) > 2:
        raise ValueError(f"{' '.join(names)}: an expert's name and a folder are taken, or a folder alone.")
    expert, out = names[0] if len(names) == 2 else None, Path(names[-1])
    mixtures = _mixtures(mixture or [])
    if to is not To.VLLM and (copy or granularity is not None):
        raise ValueError(f"{'--copy' if copy else '--granularity'} goes with --to vllm; leave it out.")
    if to in (To.VLLM, To.VLLM_LORA) and expert is not None:
        raise ValueError(f"--to {to} writes all experts: leave {expert!r} out, or choose --to peft or --to merged.")
    if to in (To.PEFT, To.MERGED) and (expert is not None) + len(mixtures) != 1:
        raise ValueError(
            f"--to {to} writes one expert or one fixed mixture: dylora-moe export {directory} NAME {out}, or one "
            "--mixture and no NAME."
        )
    _check_place(to, out)
    command = _write(session_on(directory, base).model, to, expert, mixtures, out, granularity, copy)
    say(f"{_WRITTEN[to]}: {out}")
    if command:
        say(command)


_WRITTEN = {To.PEFT: "Adapter", To.MERGED: "Model", To.VLLM: "For vLLM", To.VLLM_LORA: "Adapters for vLLM"}


def _mixtures(texts: list[str]) -> dict[str, dict[str, float]]:
    """`half=sql:0.5,math:0.5` each, as name → expert → weight."""
    found: dict[str, dict[str, float]] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        weights: dict[str, float] = {}
        for part in rest.split(","):
            expert, _, number = part.partition(":")
            try:
                weight = float(number)
            except ValueError:
                weight = None
            if weight is None or not expert or expert in weights or not name or name in found:
                raise ValueError(
                    f"--mixture {text!r}: a name of its own, then each expert once with its weight is needed, as "
                    "half=sql:0.5,math:0.5."
                )
            weights[expert] = weight
        found[name] = weights
    return found


def _check_place(to: To, out: Path) -> None:
    """Raise `ValueError` for a folder that cannot be written to, before the base is loaded."""
    from dylora_moe.checkpoint.mixture import check_free

    from .adapters import check_empty
    from .routed import own_entries

    if to is To.PEFT:
        check_free(out)
    elif to is To.VLLM:
        own_entries(out)
    else:
        check_empty(out)


def _write(
    model: DyLoraMoE,
    to: To,
    expert: str | None,
    mixtures: dict[str, dict[str, float]],
    out: Path,
    granularity: str | None,
    copy: bool,
) -> str | None:
    """Write it; the command that serves it, if one does."""
    if to is To.VLLM:
        return model.export_vllm(out, mixtures, granularity, copy)
    if to is To.VLLM_LORA:
        return model.export_vllm_lora(out, mixtures)
    if to is To.MERGED:
        return model.export_merged(expert or next(iter(mixtures.values())), out)
    if expert is not None:
        return model.export_expert(expert, out)
    return model.export_mixture(next(iter(mixtures.values())), out)
