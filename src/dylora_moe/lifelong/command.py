"""`dylora-moe learn`."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dylora_moe.failures import Verbose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dylora_moe.data.examples import Example
    from dylora_moe.model import DyLoraMoE
    from dylora_moe.session import Session

    from .learn import Learned, Training
    from .look import Look
    from .plan import Plan

WORK = ".learning"
"""Folder in the mixture's where a training keeps its checkpoints, so that one that was cut off goes on, and where a
split is noted until all its skills are learnt. No expert can have this name."""
SECONDS = 5.0
"""Between two looks at a watched folder."""
console = Console(emoji=False)


@dataclass(frozen=True)
class Request:
    """What was asked for, of every file.

    Attributes:
        target: where the mixture is saved.
        false_alarm, everything, skills, dry_run: as of the command.
        how: the experts are trained.
    """

    target: Path
    false_alarm: float
    everything: bool
    skills: int | None
    dry_run: bool
    how: Mapping[str, Any]

    def plan(self, source: str, name: str) -> Plan:
        """The note of how the rows of a file with this hash are split into skills of this name."""
        from .plan import Plan

        return Plan(self.target / WORK, source, name, self.skills, self.false_alarm, self.how["max_length"])


def learn(
    directory: Annotated[Path, typer.Argument(help="The mixture: a checkpoint folder.")],
    data: Annotated[
        Path | None, typer.Argument(help="A file with rows: prompt and completion, messages, or text.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the new expert; default the file's.")] = None,
    false_alarm: Annotated[
        float, typer.Option(min=0.0005, max=0.5, help="Share of the rows of known skills that may be called new.")
    ] = 0.01,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only look, and say what would be done.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Learn every row, also those of known skills.")] = False,
    skills: Annotated[
        int | None,
        typer.Option(min=1, help="How many skills the new rows are of; default what is found, if it is one."),
    ] = None,
    watch: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Learn every file that comes into it.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; default three times through the rows, at least 60.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="The highest; default 2e-3·√(8/rank).")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the new expert, alpha twice as much; default the mixture's.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row; longer texts are cut into pieces.")] = 1024,
    output: Annotated[Path | None, typer.Option(help="Write the grown mixture there; default in its place.")] = None,
    base: Annotated[str | None, typer.Option(help="Another base than the checkpoint names.")] = None,
    seed: Annotated[int, typer.Option(help="Of the expert's first weights and the order of the rows.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Look at new rows, and where they are of no skill that the mixture has, learn them as a new one.

    Rows of known skills are left out; what looks like several new skills is learnt with [bold]--skills N[/]. The new
    expert alone is trained; the old ones keep every bit, and the router is computed anew from what is known of all
    skills. Killed at any moment, the folder holds the mixture before or after, and the same command goes on with the
    training.

    Example: [bold]dylora-moe learn runs/mine contracts.jsonl --name law[/]
    """
    from dylora_moe.checkpoint.mixture import check_room

    if (data is None) == (watch is None):
        raise ValueError("give a file with rows, or --watch FOLDER: one of the two.")
    if everything and (skills or 1) > 1:
        raise ValueError(f"--all with --skills {skills}: rows of known skills would be split, too; leave out one.")
    how: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    how |= {"max_length": max_length, "seed": seed, "rank": rank}
    request = Request(output or directory, false_alarm, everything, skills, dry_run, how)
    if output is None and not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; a mixture of the hub learns into another --output.")
    begun = output is not None and data is not None and _is_begun(data, name, request)
    if output is not None and not begun:
        check_room(output)
    from dylora_moe.session import Session
    from dylora_moe.training.run.lock import FolderLock

    with nullcontext() if dry_run else FolderLock(request.target).hold():
        session = Session(request.target if begun else directory, base=base)
        session.model.chat = session.chat  # older checkpoints say it in a recipe
        if data is not None:
            _learn_file(session, data, name, request)
            return
        assert watch is not None
        if not watch.is_dir():
            raise ValueError(f"--watch {watch}: no such folder.")
        if name is not None:
            raise ValueError(f"--name {name} with --watch: every file is named by itself; leave it out.")
        _watch(session, watch, request)


def _is_begun(file: Path, name: str | None, request: Request) -> bool:
    """Whether some skills of a file were learnt, and are in the mixture that is saved, and others not."""
    from dylora_moe.checkpoint.mixture import CONFIG_FILE
    from dylora_moe.composition import digest

    if not (file.is_file() and (request.target / CONFIG_FILE).exists()):
        return False
    return bool(request.plan(digest(file), name or _name_of(file)).read())


def _learn_file(session: Session, file: Path, name: str | None, request: Request) -> None:
    """Look at one file; learn what is new in it, and save the mixture after each skill."""
    from dylora_moe.composition import digest, examples_in
    from dylora_moe.report.terminal import confusion_table
    from dylora_moe.training.trainer.interrupted import Interrupted

    from .learn import check_can_learn
    from .learn import learn as run
    from .look import look

    mixture, target = session.model, request.target
    check_can_learn(mixture)
    name = name or _name_of(file)
    _check_name(name, mixture, target)
    separator = mixture.skills.separator
    rows = examples_in(file, name, separator)
    source = digest(file)
    plan = request.plan(source, name)
    with console.status(f"Looking at {len(rows)} rows"):
        seen = look(mixture, rows, session.tokenizer, separator, request.false_alarm, request.how["max_length"])
    _show(seen)
    noted = plan.read()
    learnt = [one for one in noted if one in mixture.skills and mixture.skills[one].is_from(source)]
    if learnt:
        _say(f"Learnt before: {', '.join(learnt)}, of {', '.join(noted)}.")
        parts = {one: [seen.examples[n] for n in numbers] for one, numbers in noted.items() if one not in learnt}
    else:
        parts = _parts(seen, name, request)
    if request.dry_run and parts:
        trained = ", ".join(f"{one!r} on {len(part)} rows" for one, part in parts.items())
        _say(f"Dry run: would train {trained}.")
    if request.dry_run:
        return
    for one in parts:
        _check_name(one, mixture, target)
    if len(parts) > 1 and not learnt:
        numbers = {id(row): number for number, row in enumerate(seen.examples)}
        plan.write({one: [numbers[id(row)] for row in part] for one, part in parts.items()})
    for one, part in parts.items():
        started, how = time.perf_counter(), _training(mixture, target / WORK, request.how)
        try:
            learned = run(mixture, part, one, session.tokenizer, separator, request.false_alarm, True, source, how)
        except Interrupted as stopped:
            _say(f"Stopped; {target} lacks {one!r}, and the same command goes on with the training.")
            raise typer.Exit(stopped.exit_code) from stopped
        if mixture.folder != target:
            session.tokenizer.save_pretrained(target)
        mixture.save_pretrained(target)
        _drop_trainings(target)
        taught = [each for each in mixture.expert_names if each in mixture.skills]
        console.print(confusion_table(mixture.skills.confusion(), taught))
        _report(learned, target, time.perf_counter() - started)
    if learnt or parts:
        _drop_trainings(target)
        plan.file.unlink(missing_ok=True)
        with suppress(OSError):  # the plan of another file lies there
            (target / WORK).rmdir()


def _drop_trainings(target: Path) -> None:
    """Remove the checkpoints of trainings: what they go on from is no more."""
    for training in (target / WORK).glob("*/"):
        shutil.rmtree(training, ignore_errors=True)


def _name_of(file: Path) -> str:
    """What the skill of a file is called."""
    return re.sub(r"\W+", "_", file.name.partition(".")[0], flags=re.ASCII).strip("_")


def _parts(seen: Look, name: str, request: Request) -> dict[str, Sequence[Example]]:
    """What is to be learnt: skill → rows. Says why if it is nothing.

    Raises:
        ValueError: one of so many skills would have too few rows.
    """
    from .look import FEWEST_ROWS

    if seen.reason and not request.everything:
        _say(f"Nothing was learnt: {seen.reason}. --all learns every row, whatever it is.")
        return {}
    parts = [seen.examples] if request.everything else seen.parts(request.skills)
    if request.skills is None and len(parts) > 1:
        _propose(parts)
        return {}
    few = [len(part) for part in parts if len(part) < FEWEST_ROWS]
    if few and not request.everything:
        raise ValueError(
            f"--skills {request.skills}: of so many skills one would have {few[-1]} of the {len(seen.new)} new rows; "
            f"each needs {FEWEST_ROWS}. Ask for fewer."
        )
    if len(parts) == 1:
        return {name: parts[0]}
    return {f"{name}_{number}": part for number, part in enumerate(parts, start=1)}


def _check_name(name: str, mixture: DyLoraMoE, target: Path) -> None:
    """Raise `ValueError` if an expert cannot be called so, or where it is to be saved there is something else."""
    from dylora_moe.checkpoint.mixture import saved_experts
    from dylora_moe.config import check_expert_name

    try:
        check_expert_name(name, taken=mixture.expert_names, base=mixture.get_base_model())
    except ValueError as error:
        raise ValueError(f"{error} Say how the expert is to be called with --name, or rename the file.") from error
    if (target / name).exists() and name not in saved_experts(target):
        raise ValueError(f"{target / name} is in the way of the expert; give another --name, or move it.")


def _propose(parts: Sequence[tuple[Example, ...]]) -> None:
    """Say how rows of several skills would be split."""
    _say(f"The new rows look like {len(parts)} skills:")
    table = Table()
    table.add_column("rows", justify="right")
    table.add_column("such as")
    for part in parts:
        table.add_row(str(len(part)), Text(" ".join(part[0].question.split())[:80]))
    console.print(table)
    _say(f"Nothing was learnt. --skills {len(parts)} learns them so, --skills 1 all as one.")


def _training(mixture: Any, work: Path, how: Mapping[str, Any]) -> Training:
    from .learn import Training

    rank, rest = how["rank"], {key: value for key, value in how.items() if key != "rank"}
    lora = None if rank is None else mixture.moe_config.expert_config(r=rank, lora_alpha=2 * rank)
    return Training(**rest, lora=lora, folder=work, console=console)


def _show(seen: Look) -> None:
    """What the rows of a file are."""
    _say(f"{len(seen.examples)} rows, together {seen.whole}")
    table = Table()
    table.add_column("answer")
    table.add_column("rows", justify="right")
    for answer, count in seen.counts.items():
        table.add_row(answer, str(count))
    console.print(table)
    for left, why in ((seen.twice, "there twice"), (seen.too_long, "longer than --max-length or the base's context")):
        if left:
            _say(f"{left} rows were left out: {why}.")


def _report(learned: Learned, target: Path, seconds: float) -> None:
    """What changed."""
    from dylora_moe.skills.separation import SAME

    assert learned.moved is not None
    gone, kept = (sum(numbers) for numbers in zip(*learned.moved.values(), strict=True)) if learned.moved else (0, 0)
    share = f" ({gone / kept:.1%})" if kept else ""
    _say(f"Learned {learned.name!r} from {learned.rows} rows in {seconds:.0f} s. Of {kept} kept rows of the skills")
    _say(f"before, {gone} are routed differently{share}; no other expert changed. Checkpoint: {target}")
    if learned.nearest is not None and learned.nearest[1] < SAME:
        other, apart = learned.nearest
        _say(
            f"Warning: {learned.name!r} and {other!r} are the same skill as far as their rows tell ({apart:.1f}, under "
            f"{SAME:g}). `dylora-moe merge` makes one of them."
        )


def _watch(session: Session, folder: Path, request: Request) -> None:
    """Learn the files of a folder as they come, until interrupted."""
    from dylora_moe.composition import digest
    from dylora_moe.data.section import FILE_SUFFIXES

    done: set[str] = set()
    unread: set[str] = set()
    found: dict[str, tuple[int, int]] = {}
    _say(f"Watching {folder}; stop with Ctrl-C.")
    while True:
        before, found = found, {}
        for file in sorted(folder.iterdir()):
            if not file.name.endswith(FILE_SUFFIXES):
                continue
            try:
                now = file.stat()
                found[file.name] = (now.st_size, now.st_mtime_ns)
                if found[file.name] != before.get(file.name):
                    continue  # it may still be written to
                source = digest(file)
            except OSError as error:  # gone, or not to be read
                if file.name not in unread:
                    _say(f"{file.name}: {error}")
                unread.add(file.name)
                continue
            if source in done:
                continue
            done.add(source)
            learnt = any(skill.is_from(source) for skill in session.model.skills.values())
            if learnt and not request.plan(source, _name_of(file)).read():
                _say(f"{file.name} was learnt before.")
                continue
            try:
                _learn_file(session, file, None, request)
            except (ValueError, FloatingPointError) as error:  # one file that cannot be used does not end the watch
                _say(f"{file.name}: {error}")
        time.sleep(SECONDS)


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
