"""Generic texts of no skill, beside which novelty sees how far apart skills are; what the base makes of them is kept.

The texts are part of the package. The views of a base are computed at first need and kept in a file in the user's cache
folder: `DYLORA_MOE_CACHE`, else dylora-moe in `XDG_CACHE_HOME` or ~/.cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .features import Row
from .reading import Reading
from .skill import VIEWS, RowViews

TEXTS = Path(__file__).parent / "background.jsonl"
CACHE_VARIABLE = "DYLORA_MOE_CACHE"

logger = logging.getLogger(__name__)


def background_texts() -> list[dict[str, str]]:
    """Rows with `prompt`, empty for plain text, and `completion`."""
    with TEXTS.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def background_views(reading: Reading, rows: Sequence[Row], read: Callable[[Sequence[Row]], RowViews]) -> RowViews:
    """The views of the background, from the cache or by reading them.

    A cache that cannot be read or written, or holds something else, is no error.

    Args:
        reading: how the rows are read, for the file's name.
        rows: the texts' tokens.
        read: reads rows, each with another key, in their order.
    """
    name = hashlib.sha256(json.dumps([asdict(reading), VIEWS], sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder() / f"background-{name}.safetensors"
    views = _cached(file, rows, reading.width)
    if views is None:
        logger.info("reading %d texts of no skill, once for this base", len(rows))
        views = read(rows)
        _keep(views, file)
    return views


def cache_folder() -> Path:
    """Where the views are kept."""
    own = os.environ.get(CACHE_VARIABLE)
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dylora-moe"


def _cached(file: Path, rows: Sequence[Row], width: int) -> RowViews | None:
    try:
        tensors = load(file.read_bytes())
        views = RowViews(tensors["keys"], tensors["counts"], tensors["states"])
    except (OSError, SafetensorError, KeyError):
        return None
    counts = torch.tensor([[min(row.prompt, len(row.ids) - 1), max(len(row.ids) - 1 - row.prompt, 0)] for row in rows])
    fits = (
        torch.equal(views.keys, torch.tensor([row.key for row in rows]))
        and torch.equal(views.counts, counts)
        and views.states.shape == (len(rows), len(VIEWS), width)
        and views.states.dtype == torch.float16
        and bool(views.states.isfinite().all())
    )
    return views if fits else None


def _keep(views: RowViews, file: Path) -> None:
    data = save({"keys": views.keys, "counts": views.counts, "states": views.states.contiguous()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent, prefix=f"{file.name}.") as temporary:
            written = Path(temporary) / file.name
            written.write_bytes(data)
            os.replace(written, file)
    except OSError as error:
        logger.info("%s cannot be written (%s); the texts are read anew next time", file, error)
