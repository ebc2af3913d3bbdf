"""The folder of a run: what it was asked to do, what it has finished, what it logged.

output/recipe.yaml                 the resolved recipe
output/environment.json            versions, seed, number of processes
output/stages/NAME/checkpoint-N    a stage in progress, see `checkpoints`
output/stages/NAME/trained/        what a finished stage trained: a mixture, or one expert
output/stages/NAME/history.json    what it logged
output/stages/NAME/complete        written last; a stage without it is not finished
output/…                           the resulting mixture, results.json, history.json, report.html
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dylora_moe.checkpoint.adapters import read_adapter
from dylora_moe.checkpoint.files import CheckpointError, read_json, write_file
from dylora_moe.checkpoint.mixture import OWN_FILES
from dylora_moe.model import DyLoraMoE
from dylora_moe.schema import RecipeError, parse_yaml
from dylora_moe.training.recipe.methods import Stage
from dylora_moe.training.recipe.recipe import parse_recipe
from dylora_moe.training.recipe.sections import SECRETS, Recipe
from dylora_moe.training.trainer.checkpoints import COMPLETE_FILE, last_complete, mark_complete

from .arguments import recipe_text, resolved
from .lock import FolderLock

RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
HISTORY_FILE = "history.json"
RESULTS_FILE = "results.json"
STAGES = "stages"
TRAINED = "trained"
PACKAGES = ("dylora-moe", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "tokenizers")
FREE_TO_CHANGE = ("output", "eval")
"""Sections of a recipe that may differ when a run is resumed: they do not touch the training."""


class RunFolder:
    """The folder of one run of `recipe`.

    Args:
        recipe: what the run does.
        world_size: number of processes.
    """

    def __init__(self, recipe: Recipe, world_size: int = 1):
        self.recipe, self.world_size = recipe, world_size
        self.path = Path(recipe.output)
        self.lock = FolderLock(self.path)

    def check(self, resume: bool, data: Mapping[str, str], context: int) -> None:
        """Whether the run can begin, or with `resume` be gone on with.

        Args:
            resume: the run was begun before.
            data: domain → fingerprint of its training examples.
            context: the longest sequence the base was made for, in tokens.

        Raises:
            ValueError: the folder is a file, or holds unfinished work and `resume` is not asked for.
            RecipeError: `resume`, but the recipe, the data or the number of processes is another one.
            CheckpointError: `resume`, but there is no run.
        """
        if self.path.is_file():
            raise ValueError(f"output: {self.path} is a file; give a folder.")
        if resume:
            self._check_same(data, context)
            return
        begun = [folder for folder in self._stage_folders() if last_complete(folder) or is_finished(folder)]
        if begun and not self.is_finished:
            raise ValueError(
                f"{self.path} holds a run that was cut off (stage {begun[-1].name}): go on with --resume, give another "
                "--output, or remove the folder."
            )

    def start(self, data: Mapping[str, str], context: int) -> bool:
        """Begin the run; whether a finished one was replaced.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        replaced = self.is_finished
        try:
            shutil.rmtree(self.path / STAGES, ignore_errors=True)
            for name in (RESULTS_FILE, HISTORY_FILE):
                (self.path / name).unlink(missing_ok=True)
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.path / RECIPE_FILE, recipe_text(self.recipe, context))
            write_file(self.path / ENVIRONMENT_FILE, json.dumps(self._environment(data), indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}. Nothing was trained.") from error
        return replaced

    @property
    def is_finished(self) -> bool:
        """Whether there is a run that came to its end."""
        return (self.path / RESULTS_FILE).is_file()

    def stage(self, stage: Stage) -> Path:
        """The folder of a stage."""
        return self.path / STAGES / stage.name

    def history(self, stages: list[Stage]) -> list[dict[str, Any]]:
        """What the finished stages logged, each row with its stage.

        Raises:
            CheckpointError: a stage's file is damaged.
        """
        rows = []
        for stage in stages:
            file = self.stage(stage) / HISTORY_FILE
            if file.is_file():
                rows += [{"stage": stage.name, **row} for row in _read_history(file)]
        return rows

    def _stage_folders(self) -> list[Path]:
        folder = self.path / STAGES
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def _environment(self, data: Mapping[str, str]) -> dict[str, Any]:
        return {
            "versions": {name: found for name in PACKAGES if (found := _version(name))},
            "seed": self.recipe.seed,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "world_size": self.world_size,
            "data": dict(data),
            "command": [Path(sys.argv[0]).name, *map(_without_secrets, sys.argv[1:])],
        }

    def _begun_with(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The recipe and the environment that the run was begun with."""
        remedy = "Without it the run cannot be resumed; put it back, or start afresh with another --output."
        file = self.path / RECIPE_FILE
        try:
            recipe = parse_yaml(file.read_text(encoding="utf-8"), str(file))
            environment = read_json(self.path / ENVIRONMENT_FILE)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} holds no run to resume ({error.filename} is missing).") from error
        except CheckpointError as error:
            raise CheckpointError(f"{error} {remedy}") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error} {remedy}") from error
        if not isinstance(recipe, dict):
            raise CheckpointError(f"{file} is empty or damaged. {remedy}")
        return recipe, environment

    def _check_same(self, data: Mapping[str, str], context: int) -> None:
        saved, environment = self._begun_with()
        try:  # a run may have been begun when fewer keys, and fewer defaults, were written
            before = resolved(parse_recipe(saved), context)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path / RECIPE_FILE}: {error} The run cannot be resumed with it; put the file back, or start "
                "afresh with another --output."
            ) from error
        now = resolved(self.recipe, context)
        for key in FREE_TO_CHANGE:
            before.pop(key, None)
            now.pop(key, None)
        changed = differences(before, now)
        if changed:
            raise RecipeError(
                f"{self.path} was begun with another recipe, so it cannot be resumed: {'; '.join(changed)}. Go back to "
                "these values, or start afresh with another --output."
            )
        begun_with = environment.get("data") or {}
        if not isinstance(begun_with, dict):
            raise CheckpointError(f"{self.path / ENVIRONMENT_FILE}: 'data' holds {begun_with!r}; expected a mapping.")
        for name, fingerprint in begun_with.items():
            if data.get(name) != fingerprint:
                raise RecipeError(
                    f"{self.path} was begun with other data for {name!r} ({fingerprint}; now {data.get(name)}), so it "
                    "cannot be resumed. Bring the old data back, or start afresh with another --output."
                )
        if environment.get("world_size") != self.world_size:
            raise RecipeError(
                f"{self.path} was begun with {environment.get('world_size')} processes; resume with as many, not with "
                f"{self.world_size}."
            )


def is_finished(folder: Path) -> bool:
    """Whether a stage's folder was written to its end."""
    return (folder / COMPLETE_FILE).is_file()


def finish(folder: Path, stage: Stage, history: list[dict[str, Any]]) -> None:
    """Mark a stage as finished, whose outcome is in `folder / "trained"`; of one expert's stage only that is kept."""
    if not stage.router:
        for entry in (folder / TRAINED).iterdir():
            if entry.is_dir() and entry.name not in stage.experts:
                shutil.rmtree(entry)
            elif entry.name in OWN_FILES:
                entry.unlink()
    write_file(folder / HISTORY_FILE, json.dumps(history, indent=1) + "\n")
    mark_complete(folder)


def load_finished(mixture: DyLoraMoE, folder: Path, stage: Stage) -> None:
    """Put what a finished stage trained into the mixture."""
    trained = folder / TRAINED
    if stage.router:
        mixture.restore(trained)
        return
    base: Any = mixture.get_base_model()
    for name in stage.experts:
        mixture.load_expert(name, read_adapter(trained / name, base, name).tensors)


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """The leaves in which two resolved recipes differ, as `train.max_steps was 5, is 6`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if before == now else [f"{path} was {before!r}, is {now!r}"]


def _read_history(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged: {error}. Write [] into it to go on without what that stage logged."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CheckpointError(
            f"{file} is damaged: it holds no list of rows. Write [] into it to go on without what that stage logged."
        )
    return rows


def _without_secrets(argument: str) -> str:
    """A command line's argument; of `train.hub_token=…` only the key."""
    return re.sub(rf"\b({'|'.join(SECRETS)})\s*=.*", r"\1=…", argument)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
