"""The library of skills in a checkpoint: its numbers, and beside them where they are from. No text.

dir/skills.safetensors                 sums in float64, means of rows
dir/skills.json                        how texts were read; tokens, rows and provenance of every skill
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from dylora_moe.skills.library import SkillLibrary

from .files import CheckpointError, read_json, read_tensors

TENSORS_FILE = "skills.safetensors"
DESCRIPTION_FILE = "skills.json"
SKILL_FILES = (TENSORS_FILE, DESCRIPTION_FILE)


def write_skills(folder: Path, library: SkillLibrary) -> None:
    """Write both files into a folder that is being made."""
    tensors = {name: tensor.contiguous().clone() for name, tensor in library.tensors().items()}
    save_file(tensors, folder / TENSORS_FILE)
    text = json.dumps(library.description(), indent=2, sort_keys=True) + "\n"
    (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")


def read_skills(folder: Path, experts: Sequence[str], width: int) -> SkillLibrary:
    """The library in a folder.

    Args:
        folder: of the checkpoint.
        experts: of the mixture: every skill is one's.
        width: D of its base.

    Raises:
        CheckpointError: a file is missing or damaged, or they belong to another mixture.
    """
    file = folder / DESCRIPTION_FILE
    tensors, description = read_tensors(folder / TENSORS_FILE), read_json(file)
    try:
        library = SkillLibrary.from_plain(tensors, description)
    except ValueError as error:
        raise CheckpointError(
            f"{folder / TENSORS_FILE} and {DESCRIPTION_FILE}: {error} Without them the mixture loads, and routes as it "
            'did: delete both, set "skills" to false in moe_config.json, and teach all experts anew.'
        ) from error
    if unknown := sorted(set(library) - set(experts)):
        raise CheckpointError(f"{file}: skills {', '.join(unknown)} are no experts; they are {', '.join(experts)}.")
    if library.reading is not None and library.reading.width != width:
        raise CheckpointError(f"{file}: made for a base of width {library.reading.width}; this one has {width}.")
    return library
