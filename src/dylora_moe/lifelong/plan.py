"""How the new rows of a file were dealt out to several skills, noted until all of them are learnt.

Once one is learnt its rows are known, so that a second look would deal out the others differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dylora_moe.checkpoint.files import read_json, write_file


class Plan:
    """The note for one file and one way to split it. It holds no text: rows are numbers of `Look.examples`.

    Args:
        folder: where it lies.
        asked: what decides the split: the file's hash, the name, how many skills, …; anything that JSON can hold.
    """

    def __init__(self, folder: Path, *asked: Any):
        self.file = folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.json"

    def read(self) -> dict[str, list[int]]:
        """Skill → its rows; empty if nothing was noted."""
        return read_json(self.file) if self.file.exists() else {}

    def write(self, parts: Mapping[str, Sequence[int]]) -> None:
        """Note the rows of each skill."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, json.dumps(parts))
