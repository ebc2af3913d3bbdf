"""`dylora-moe experts | merge | rename | freeze | teach | import | remove | forget`: a mixture kept in order.

Each is a method of the mixture between loading and saving. The folder is locked meanwhile and replaced as a whole; what
else lies in it (tokenizer, results) stays.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console

from .failures import Verbose

if TYPE_CHECKING:  # whatever needs torch is imported by the command that uses it: help answers at once
    from rich.table import Table

    from .model import DyLoraMoE
    from .session import Session

commands = typer.Typer()
console = Console(emoji=False)

Directory = Annotated[Path, typer.Argument(help="A checkpoint folder.")]
Name = Annotated[str, typer.Argument(help="The expert.")]
Output = Annotated[Path | None, typer.Option(help="Write the mixture there and leave DIRECTORY as it is.")]
Base = Annotated[str | None, typer.Option(help="Another base than the checkpoint names.")]
Separator = Annotated[
    str | None,
    typer.Option(help="What stands between prompt and completion; default as before, else a new line."),
]


@contextmanager
def _changing(directory: Path, output: Path | None, base: str | None) -> Iterator[Session]:
    """A loaded mixture, which is saved after the block if nothing failed in it."""
    from .checkpoint.mixture import check_room
    from .training.run.lock import FolderLock

    if output is None and not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; to change a mixture of the hub, write it to another --output.")
    if output is not None:
        check_room(output)
    target = output or directory
    with FolderLock(target).hold():
        session = session_on(directory, base)
        session.model.chat = session.chat  # older checkpoints say it in a recipe, which --output would lack
        yield session
        if output is not None:
            session.tokenizer.save_pretrained(output)
        session.model.save_pretrained(target)
    say(f"Checkpoint: {target} ({', '.join(session.model.expert_names)})")


def session_on(directory: Path, base: str | None) -> Session:
    """A loaded mixture, on the base that it was made for: what is written names it."""
    from .session import Session

    session = Session(directory, base=base)
    if base is not None and session.model.skills.is_of_another(session.model.get_base_model()):
        raise ValueError(
            f"--base {base}: its weights are not those of the base that {directory} was taught its skills with, and "
            "nothing was written. Say where that base is, or leave --base out if the checkpoint names it rightly."
        )
    return session


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------- looking


class _Expert(NamedTuple):
    """A row of the table.

    Attributes:
        name: of the expert.
        state: `routed` or `new`, and `frozen`.
        rank: of its layers, the least and the largest where they differ.
        rows, tokens: taught to its skill, 0 without one.
        taught: the day of the last teaching, UTC.
        tensor_bytes: of its tensors.
        skill_bytes: of what the library keeps of it alone.
        nearest: the skill that is least apart, and how far.
        load: its share of the tokens of a text.
    """

    name: str
    state: str
    rank: str
    rows: int
    tokens: int
    taught: str
    tensor_bytes: int
    skill_bytes: int
    nearest: tuple[str, float] | None
    load: float | None


@commands.command()
def experts(
    directory: Directory,
    text: Annotated[str | None, typer.Option(help="Show where this text goes, or the rows of this file.")] = None,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """List the experts: state, rank, what they were taught, their size, the skill that is nearest, the load on a text.

    [bold]size[/] is that of the tensors, and of what the library keeps of the skill. [bold]nearest[/] is Hotelling's
    T² of the kept rows of two skills, over what it is for rows of one kind: about 1 for two halves of a skill. Below 2
    two skills are the same. Of rows that are longer than the base's context the beginning is routed.

    Example: [bold]dylora-moe experts runs/mine --text questions.jsonl[/]
    """
    from .session import Session

    session = Session(directory, base=base)
    model, library = session.model, session.model.skills
    load = {} if text is None else _load(session, text)
    console.print(_table(_experts(model, load), text is not None))
    config, pooled = model.moe_config, library.size - sum(library.sizes().values())
    said = [f"router {config.router_type}, {config.granularity} granularity", f"skills {_bytes(library.size)}"]
    if pooled:
        said.append(f"of which {_bytes(pooled)} are pooled (compact)")
    say(", ".join(said))
    warn_of_twins(model)


def _experts(model: DyLoraMoE, load: dict[str, float]) -> list[_Expert]:
    library = model.skills
    nearest, sizes, found = library.separation(), library.sizes(), []
    for name in model.expert_names:
        ranks = sorted({layer.r[name] for layer in model.routed_layers if name in layer.r})
        skill = library.get(name)
        found.append(
            _Expert(
                name,
                f"{model.expert_states[name]}{', frozen' if name in model.frozen_experts else ''}",
                "–".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
                skill.rows if skill else 0,
                skill.tokens if skill else 0,
                max((each.when for each in skill.taught), default="")[:10] if skill else "",
                sum(part.tensor.nbytes for part in model.expert_tensors(name)),
                sizes.get(name, 0),
                nearest.get(name),
                load.get(name),
            )
        )
    return found


def _table(rows: Sequence[_Expert], loaded: bool) -> Table:
    from rich.table import Table

    table = Table()
    for title in (
        "expert",
        "state",
        "rank",
        "rows",
        "tokens",
        "taught",
        "size",
        "nearest",
        *(["load"] if loaded else []),
    ):
        table.add_column(title, justify="left" if title in ("expert", "state") else "right", no_wrap=title == "expert")
    for row in rows:
        size = _bytes(row.tensor_bytes) + (f" + {_bytes(row.skill_bytes)}" if row.skill_bytes else "")
        nearest = f"{row.nearest[0]} {row.nearest[1]:.1f}" if row.nearest else ""
        taught = [f"{row.rows:,}", f"{row.tokens:,}", row.taught] if row.rows else [""] * 3
        load = [] if row.load is None else [f"{row.load:.1%}"]
        table.add_row(row.name, row.state, row.rank, *taught, size, nearest, *load)
    return table


def _bytes(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def _load(session: Session, text: str) -> dict[str, float]:
    """Share of the tokens per expert, of a text or of the rows of a file; a row's prompt decides where it can."""
    import torch

    from .composition import examples_in
    from .data.examples import Example, encode
    from .data.section import FILE_SUFFIXES
    from .skills.features import window_of

    rows = [Example("", text)]
    if os.path.isfile(text):  # a Path of a long text would raise
        if text.endswith(FILE_SUFFIXES):
            rows = examples_in(Path(text), "text", session.model.skills.separator)
        else:
            rows = [Example("", Path(text).read_text(encoding="utf-8"))]
    elif not text:
        raise ValueError("--text is empty; there is nothing to route.")
    context = window_of(session.model.get_base_model())
    with torch.no_grad(), session.model.trace() as trace:
        for row in rows:
            ids, prompt = encode(row, session.tokenizer, session.chat)
            tokens = torch.tensor([ids[:context]], device=session.model.device)
            labels = tokens.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) < prompt, -100)
            session.model(tokens, labels=labels if 0 < prompt < tokens.shape[1] else None)
    return trace.load()


def warn_of_twins(model: DyLoraMoE, *names: str) -> None:
    """Say which skills, of `names` or all, are the same as far as their rows tell."""
    from .skills.separation import SAME

    nearest = model.skills.separation(*names)
    pairs = {frozenset((name, other)): value for name, (other, value) in nearest.items() if value < SAME}
    for pair, value in pairs.items():
        one, other = sorted(pair)
        say(
            f"{one} and {other} are the same as far as their rows tell ({value:.1f}, below {SAME:g}): texts of one "
            "will go to the other as well. Merge them, or teach each more of what is its own."
        )


# ---------------------------------------------------------------------- changing


@commands.command()
def merge(
    directory: Directory,
    names: Annotated[list[str], typer.Argument(metavar="EXPERT...", help="The experts, at least two.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the merged expert; exact from the sum of theirs on.")],
    name: Annotated[str | None, typer.Option(help="Of the merged expert; default theirs joined by _.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of each, e.g. 0.7,0.3; default equal, of sum 1.")] = None,
    output: Output = None,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Put one expert in the place of several: their weighted sum, cut off at a rank, and one skill of theirs.

    Printed is what the cut costs: ‖ΔW − ΔW_R‖ / ‖ΔW‖, over all layers and in the worst.

    Example: [bold]dylora-moe merge runs/mine sql spider --name sql --rank 16[/]
    """
    with _changing(directory, output, base) as session:
        model = session.model
        cut = model.merge_experts(names, rank, name, _numbers(weights))
        merged = model.expert_names[-1]
        say(
            f"{', '.join(names)} → {merged}, rank {rank}: relative error {cut.error:.4f} over all layers, at most "
            f"{cut.by_layer[cut.worst]:.4f} ({cut.worst})"
        )
        _say_if_new(model, merged)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights {text!r}: numbers separated by commas are needed, e.g. 0.7,0.3.") from None


def _say_if_new(model: DyLoraMoE, name: str) -> None:
    if model.expert_states[name] == "new":
        remedy = f"dylora-moe teach DIRECTORY {name} TEXTS" if model.router.computed else "start_routing, then training"
        say(f"{name} is new: it works where it is forced, and the router does not choose it before {remedy}.")


@commands.command()
def rename(
    directory: Directory,
    old: Name,
    new: Annotated[str, typer.Argument(help="Its new name.")],
    output: Output = None,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Give an expert and its skill another name; tensors, order and router stay.

    Example: [bold]dylora-moe rename runs/mine expert_0 sql[/]
    """
    with _changing(directory, output, base) as session:
        session.model.rename_expert(old, new)
        say(f"{old} → {new}")


@commands.command()
def freeze(
    directory: Directory,
    name: Name,
    thaw: Annotated[bool, typer.Option("--thaw", help="Let it train again.")] = False,
    output: Output = None,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Keep an expert out of later training; it is used and routed as before.

    Example: [bold]dylora-moe freeze runs/mine sql[/]
    """
    with _changing(directory, output, base) as session:
        (session.model.unfreeze_expert if thaw else session.model.freeze_expert)(name)
        say(f"{name} is {'trainable' if thaw else 'frozen'}")


@commands.command()
def teach(
    directory: Directory,
    name: Name,
    texts: Annotated[Path, typer.Argument(help="A file of rows with prompt and completion, messages, or text.")],
    separator: Separator = None,
    output: Output = None,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Add texts to what an expert is for, and compute the router anew. Nothing is trained, and no text is kept.

    Example: [bold]dylora-moe teach runs/mine sql questions.jsonl[/]
    """
    _check_file(texts)
    with _changing(directory, output, base) as session:
        _teach(session, name, texts, separator)


def _teach(session: Session, name: str, texts: Path, separator: str | None) -> None:
    from .composition import digest, examples_in
    from .report.terminal import confusion_table

    model = session.model
    model.experts.check_known(name)
    separator = _separator(model, separator)
    rows = examples_in(texts, name, separator)
    with console.status(f"Reading {len(rows)} texts"):
        model.teach(name, rows, session.tokenizer, separator, digest(texts))
    skill = model.skills[name]
    say(f"{name} was taught {len(rows)} rows, in all {skill.rows:,} rows and {skill.tokens:,} tokens")
    if not model.router.computed:
        say(f"The router ({model.router.router_type}) is trained and stays as it is.")
        return
    console.print(
        confusion_table(model.skills.confusion(), [each for each in model.expert_names if each in model.skills])
    )
    warn_of_twins(model, name)


def _separator(model: DyLoraMoE, given: str | None) -> str:
    if given is not None:
        return given.replace("\\n", "\n").replace("\\t", "\t")  # as a shell passes them
    return model.skills.separator


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"no file {str(file)!r} with texts.")


@commands.command("import")
def import_(
    directory: Directory,
    name: Annotated[str, typer.Argument(help="What the expert is to be called.")],
    adapter: Annotated[str, typer.Argument(help="A stock PEFT LoRA adapter: folder or hub id.")],
    texts: Annotated[Path | None, typer.Option(help="Teach it these rows at once, so that it is routed.")] = None,
    separator: Separator = None,
    output: Output = None,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Add an adapter that was trained elsewhere as an expert, frozen; the others stay as they are.

    Example: [bold]dylora-moe import runs/mine law adapters/law --texts law.jsonl[/]
    """
    if texts is not None:
        _check_file(texts)
    with _changing(directory, output, base) as session:
        session.model.add_expert(name, adapter)
        say(f"{name} was added, {session.model.parameter_report().experts[name]:,} parameters")
        if texts is not None:
            _teach(session, name, texts, separator)
        _say_if_new(session.model, name)


@commands.command()
def remove(
    directory: Directory, name: Name, output: Output = None, base: Base = None, verbose: Verbose = False
) -> None:
    """Remove an expert, its row of the router and its skill; the other rows stay as they are (see `forget`).

    Example: [bold]dylora-moe remove runs/mine law[/]
    """
    with _changing(directory, output, base) as session:
        session.model.remove_expert(name)
        say(f"{name} was removed; the router's other rows are what they were")


@commands.command()
def forget(
    directory: Directory,
    name: Name,
    inexact: Annotated[
        bool, typer.Option("--inexact", help="Forget from a compact library, too: its share of the pool stays.")
    ] = False,
    output: Output = None,
    base: Base = None,
    verbose: Verbose = False,
) -> None:
    """Remove an expert and its skill, and leave the others as if it had never been there.

    A router in closed form is computed anew from the other skills: its scores are, bit for bit, those of never having
    taught this one. A trained router keeps what it learnt beside it.

    Example: [bold]dylora-moe forget runs/mine law[/]
    """
    with _changing(directory, output, base) as session:
        exactly = session.model.router.computed and not (
            name in session.model.skills and session.model.skills[name].compact
        )
        session.model.forget(name, exact=not inexact)
        rest = (
            "the router scores the others as if it had never been there" if exactly else "the others are what they were"
        )
        say(f"{name} was forgotten; {rest}")
