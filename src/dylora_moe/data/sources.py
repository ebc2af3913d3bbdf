"""Where examples come from: JSON, Parquet and CSV files, hub datasets, generated skills."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dylora_moe.schema import nearest

from .examples import DataError, Example
from .generated import generate
from .section import FORMS, DataRecipe

Split = Literal["train", "test"]
Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its columns
ROLES = ("system", "user", "assistant")
_CSV_BLOCK = 1 << 24  # bytes; pyarrow wants every row to be shorter than two blocks
_VALUES_SHOWN = 10


def load_examples(
    domain: str, data: DataRecipe, split: Split, seed: int = 0, limit: int | None = None
) -> list[Example]:
    """The examples of one expert: generated, read from a file, or from a dataset.

    A row with `messages` gives one example for each of the assistant's turns, one with `prompt` and `completion` or
    with `text` gives one. Without `data.columns`, the first row tells which of these the data has.

    Args:
        domain: the expert's name.
        data: where its data comes from.
        split: `train` or `test`.
        seed: decides which instances of a generated skill are drawn.
        limit: at most so many, on top of the limit in `data`; later rows are not looked at.

    Raises:
        DataError: the source cannot be read to its end, has no such split, or a row cannot be used; the message names
            the file and line or row, and the column.
    """
    limits = [n for n in (limit, data.limit if split == "train" else data.test_limit) if n is not None]
    if data.skill is not None:
        count = data.train if split == "train" else data.test
        assert isinstance(count, int)
        rows = generate(data.skill, split, min([count, *limits]), seed)
        return [Example(row["prompt"], row["completion"], domain, separator=data.separator) for row in rows]
    name, found = _open(domain, data, split)
    if data.filter:
        found = _matching(found, data.filter, name)
    examples = list(islice(_examples(found, data, domain), min(limits, default=None)))
    if not examples:
        raise DataError(f"{name}: no examples; expected rows with prompt and completion, messages, or text.")
    return examples


# ---------------------------------------------------------------------- sources of rows


def _open(domain: str, data: DataRecipe, split: Split) -> tuple[str, Iterator[Row]]:
    """What to call the source, and its rows."""
    if data.path is not None:
        wanted = data.split if split == "train" else data.test_split
        if wanted is None:
            raise DataError(f"experts.{domain}.data has no test split; add `test_split: NAME`.")
        name = f"dataset {data.path} ({wanted})"
        return name, _read_dataset(data, wanted, name)
    source = data.train if split == "train" else data.test
    if source is None:
        raise DataError(f"experts.{domain}.data has no {split} file; add `{split}: FILE.jsonl`.")
    path = Path(str(source))
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return str(path), _opened(path, _READERS[suffix])


def _opened(path: Path, reader: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a file; what a library raises while reading it becomes a `DataError`."""
    import pyarrow

    try:
        yield from reader(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except (OSError, EOFError, zlib.error) as error:  # a gzip file cut short is an EOFError
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _read_json_lines(path: Path) -> Iterator[Row]:
    with _open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _object(_parse_json(line, place), place)


def _read_json(path: Path) -> Iterator[Row]:
    """One array of objects, or JSON lines under the other suffix."""
    with _open_bytes(path) as file:
        is_array = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        yield from _read_json_lines(path)
        return
    with _open_bytes(path) as file:
        values = _parse_json(file.read(), str(path))
    for number, value in enumerate(values, start=1):
        place = f"{path}, row {number}"
        yield place, _object(value, place)


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def _read_csv(path: Path) -> Iterator[Row]:
    """Every cell as text; rows are counted as pyarrow and spreadsheets do, the header being row 1."""
    import pyarrow
    from pyarrow import csv

    options: dict[str, Any] = {
        "read_options": csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK),  # threads cost the row number
        "parse_options": csv.ParseOptions(newlines_in_values=True),
    }
    with csv.open_csv(path, **options) as file:
        names = file.schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: the column {', '.join(twice)} is there more than once.")
    as_text = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    with csv.open_csv(path, convert_options=as_text, **options) as file:
        number = 1
        for batch in file:
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _read_dataset(data: DataRecipe, split: str, name: str) -> Iterator[Row]:
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled

    try:
        rows = load_dataset(str(data.path), data.name, split=split, revision=data.revision)
    except (DatasetNotFoundError, GatedRepoError) as error:
        raise DataError(
            f"{name}: {error} Check `path`, `name` and `revision`; if it is private or gated, accept its terms on the "
            "hub and log in with `hf auth login`."
        ) from error
    except ValueError as error:  # an unknown split or configuration, an id that cannot be one
        raise DataError(f"{name}: {error} Check `path`, `name` and `split`.") from error
    except (OSError, HTTPError, RuntimeError, DatasetsError) as error:
        offline = config.HF_HUB_OFFLINE and isinstance(error, ConnectionError)
        if offline or isinstance(error, OfflineModeIsEnabled):
            remedy = "not in the cache, and offline mode is on. Unset HF_HUB_OFFLINE, or give a local folder as `path`."
            raise DataError(f"{name}: {remedy}") from error
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise DataError(
            f"{name}: could not be loaded whole ({type(cause).__name__}: {cause}); nothing of it is used. Check the "
            "network and the free disk space and start again, or give a local folder as `path`."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", dict(row)


def _open_bytes(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parse_json(text: bytes, place: str) -> Any:
    try:
        value = json.loads(text.decode("utf-8-sig"))
        if b"\\ud" in text.lower():  # an escaped half of a character is valid JSON
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError(f"{place}: {half} is half of a character (a lone surrogate) and no text.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: not valid JSON ({error.msg}, {where}).") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object with 'prompt' and 'completion', got {type(value).__name__}.")
    return value


# ---------------------------------------------------------------------- rows to examples


def _matching(rows: Iterable[Row], wanted: Mapping[str, Any], name: str) -> Iterator[Row]:
    """The rows whose columns have the wanted values."""
    accepted = {column: value if isinstance(value, list) else [value] for column, value in wanted.items()}
    seen: dict[str, dict[str, None]] = {column: {} for column in wanted}
    kept = False
    for place, row in rows:
        for column in wanted:
            _check_column(row, column, place)
            if len(seen[column]) <= _VALUES_SHOWN:
                seen[column][str(row[column])] = None
        if all(any(_is(row[column], value) for value in values) for column, values in accepted.items()):
            kept = True
            yield place, row
    if not kept and any(seen.values()):
        found = "; ".join(f"{column!r} has {_listed(values)}" for column, values in seen.items())
        raise DataError(f"{name}: no row passes filter {dict(wanted)!r}. Found: {found}.")


def _is(cell: Any, wanted: str | float | bool) -> bool:
    """Whether a cell has the wanted value; text (every cell of a CSV) is compared as the value it spells."""
    if str(cell) == str(wanted):
        return True
    if isinstance(wanted, bool):
        return isinstance(cell, str) and cell.strip().lower() == str(wanted).lower()
    if isinstance(wanted, str) or isinstance(cell, bool):
        return False
    try:
        return float(cell) == wanted
    except (TypeError, ValueError):
        return False


def _examples(rows: Iterable[Row], data: DataRecipe, domain: str) -> Iterator[Example]:
    form: tuple[str, ...] = ()
    for place, row in rows:
        form = form or _form(row, data.columns, place)
        names = {key: data.columns.get(key, key) for key in form}
        for column in names.values():
            _check_column(row, column, place, used=names.values())
        extra = {key: value for key, value in row.items() if key not in names.values()}
        if form == ("messages",):
            for prompt, reply in _turns(row[names["messages"]], f"{place}, {names['messages']!r}"):
                yield Example(prompt, reply, domain, extra, data.separator)
        elif form == ("text",):
            yield Example("", _text(row, names["text"], place, "learn"), domain, extra, data.separator)
        else:
            prompt = _text(row, names["prompt"], place, "ask")
            yield Example(prompt, _text(row, names["completion"], place, "learn"), domain, extra, data.separator)


def _form(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> tuple[str, ...]:
    """Which fields the data has: those in `columns`, else the first of `FORMS` that a row has all of."""
    if columns:
        return next(form for form in FORMS if set(columns) <= set(form))
    for form in FORMS:
        if all(key in row for key in form):
            return form
    if "prompt" in row or "completion" in row:
        return ("prompt", "completion")
    raise DataError(
        f"{place}: no 'messages', no 'prompt' and 'completion', no 'text'. Its columns: {', '.join(row) or 'none'}. "
        "Name the right ones, for example `columns: {prompt: question, completion: answer}`."
    )


def _check_column(row: Mapping[str, Any], column: str, place: str, used: Collection[str] = ()) -> None:
    if column not in row:
        guess = nearest(column, [name for name in row if name not in used])
        raise DataError(f"{place}: no {column!r}.{guess} Its columns: {', '.join(row) or 'none'}.")


def _text(row: Mapping[str, Any], column: str, place: str, purpose: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} must be text, got {_shown(value)}.")
    if not value.strip():
        raise DataError(f"{place}: empty {column!r}; there is nothing to {purpose}.")
    return value


def _turns(messages: Any, place: str) -> Iterator[tuple[list[dict[str, str]], str]]:
    """For each of the assistant's turns the messages before it and what it says."""
    if not isinstance(messages, list):
        raise DataError(f"{place}: expected a list of messages, each with role and content, got {_shown(messages)}.")
    before: list[dict[str, str]] = []
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"{place}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: expected role and content, got {_shown(message)}.")
        for key in ("role", "content"):
            _check_column(message, key, where)
        role, content = message["role"], _text(message, "content", where, "say")
        if role not in ROLES:
            raise DataError(f"{where}: unknown role {role!r}; expected {', '.join(ROLES)}.")
        if role == "assistant":
            if not before:
                raise DataError(f"{where}: the assistant speaks first, so there is nothing to answer.")
            turns.append((list(before), content))
        before.append({"role": role, "content": content})
    if not turns:
        raise DataError(f"{place}: no message of the assistant, so there is nothing to learn.")
    yield from turns


def _listed(values: Iterable[str]) -> str:
    values = list(values)
    more = ", …" if len(values) > _VALUES_SHOWN else ""
    return ", ".join(_shown(value) for value in values[:_VALUES_SHOWN]) + more


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
