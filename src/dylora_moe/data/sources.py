"""Where examples come from: JSON, Parquet and CSV files, hub datasets, generated skills."""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dylora_moe.schema import nearest

from .chats import shown, turns, without_nulls
from .examples import DataError, Example
from .generated import generate
from .section import FORMS, TOOLS, DataRecipe

Split = Literal["train", "test"]
Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and its columns
OTHER_NAMES = {"messages": {"messages": "conversations"}, "prompt": {"prompt": "instruction", "completion": "output"}}
"""Names that a form's columns have elsewhere: ShareGPT's and Alpaca's."""
INPUT = "input"
"""Alpaca's column that, where it is not empty, follows the instruction on a new line."""
_CSV_BLOCK = 1 << 24  # bytes; pyarrow wants every row to be shorter than two blocks
_VALUES_SHOWN = 10


def load_examples(
    domain: str, data: DataRecipe, split: Split, seed: int = 0, limit: int | None = None
) -> list[Example]:
    """The examples of one expert: generated, read from a file, or from a dataset.

    A row with `messages` gives one example for each of the assistant's turns, one with `prompt` and `completion` or
    with `text` gives one. Without `columns` or `template`, the first row tells which of these the data has.

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
    examples = list(islice(_examples(found, data, domain, split), min(limits, default=None)))
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
    assert not isinstance(source, int)
    paths = [Path(file) for entry in ([source] if isinstance(source, str) else source) for file in files_of(entry)]
    if not paths:
        raise DataError(f"experts.{domain}.data.{split}: no file matches {source!r}.")
    rows = (row for path in paths for row in _opened(path, _READERS[_suffix(path)]))
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else ""), rows


def files_of(entry: str) -> list[str]:
    """The files that a name or a pattern stands for, sorted; a name without wild cards stands for itself."""
    if not glob.has_magic(entry) or Path(entry).exists():
        return [entry]
    return sorted(file for file in glob.glob(entry, recursive=True) if Path(file).is_file())


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


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
    """Every cell as text; rows are counted as pyarrow and spreadsheets do, the header being row 1.

    What parts the cells is read from the header: a comma, or, where it has none, a semicolon or a tab.
    """
    import pyarrow
    from pyarrow import csv

    options: dict[str, Any] = {
        "read_options": csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK),  # threads cost the row number
        "parse_options": csv.ParseOptions(newlines_in_values=True, delimiter=_delimiter(path)),
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


def _delimiter(path: Path) -> str:
    if _suffix(path) == ".tsv":
        return "\t"
    with _open_bytes(path) as file:
        header = re.sub(rb'"[^"]*"', b"", file.readline())
    return next((mark for mark in ",;\t" if mark.encode() in header), ",")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}


def _read_dataset(data: DataRecipe, split: str, name: str) -> Iterator[Row]:
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled

    if rows := _saved_to_disk(data, split, name):
        yield from rows
        return
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


def _saved_to_disk(data: DataRecipe, split: str, name: str) -> Iterator[Row] | None:
    """The rows of a folder that `save_to_disk` wrote; None for any other."""
    folder = Path(str(data.path))
    parts = (folder / "dataset_dict.json").is_file()
    if not parts and not (folder / "state.json").is_file():
        return None
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        saved: Any = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{name}: cannot be read ({type(error).__name__}: {error}); save it again.") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            known = [str(part) for part in saved]
            raise DataError(f"{name}: no split {split!r}.{nearest(split, known)} It has {', '.join(known)}.")
        saved = saved[split]
    elif split not in ("train", str(saved.split)):
        raise DataError(f"{name}: the folder holds one data set without splits; leave `split` and `test_split` out.")
    assert isinstance(saved, Dataset)
    return ((f"{name}, row {number}", dict(row)) for number, row in enumerate(saved, start=1))  # type: ignore[arg-type]


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
    except RecursionError as error:
        raise DataError(f"{place}: nested too deeply to be read.") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: not valid JSON ({error.msg}, {where}).") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{place}: cannot be read ({error}).") from error


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


def _examples(rows: Iterable[Row], data: DataRecipe, domain: str, split: Split) -> Iterator[Example]:
    columns, templates = data.columns_of(split), _compiled(data.template_of(split))
    form: tuple[str, ...] = ()
    names: dict[str, str] = {}
    for place, row in rows:
        if not form:
            form, names = _form(row, columns, templates, place)
        for column in names.values():
            _check_column(row, column, place, used=names.values())
        made = {key: _made(template, row, f"{place}, template {key!r}") for key, template in templates.items()}
        values = {**{key: row[column] for key, column in names.items()}, **made}
        used, tools = {*names.values()}, columns.get(TOOLS, TOOLS)
        shown = {key: names.get(key, key) for key in form}
        if names.get("prompt") == OTHER_NAMES["prompt"]["prompt"] and not columns and row.get(INPUT):
            used.add(INPUT)
            values["prompt"] = "\n".join(_text(row[key], key, place, "ask") for key in (names["prompt"], INPUT))
        further: dict[str, Any] = {"extra": {}, "separator": data.separator}
        chat = form == ("messages",) or all(isinstance(values.get(key), list) for key in ("prompt", "completion"))
        if chat:
            further["template"] = _beside_messages(row, tools, place)
            used |= {tools, "chat_template_kwargs"}
        further["extra"] = {key: value for key, value in row.items() if key not in used}
        if chat:
            before = [] if form == ("messages",) else values["prompt"]
            system = row.get("system") if names.get("messages") == OTHER_NAMES["messages"]["messages"] else None
            if system and not columns:
                before = [{"role": "system", "content": system}]
            messages = values[form[-1]]
            where = f"{place}, {shown[form[-1]]!r}"
            for prompt, reply in turns(before, messages, where):
                yield Example(prompt, reply, domain, place=where, **further)
        elif form == ("text",):
            yield Example("", _text(values["text"], shown["text"], place, "learn"), domain, place=place, **further)
        else:
            prompt = _text(values["prompt"], shown["prompt"], place, "ask")
            completion = _text(values["completion"], shown["completion"], place, "learn")
            yield Example(prompt, completion, domain, place=place, **further)


def _form(
    row: Mapping[str, Any], columns: Mapping[str, str], templates: Collection[str], place: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which fields the data has, and their columns: those given, else the first that a row has all of."""
    if given := ({*columns} - {TOOLS}) | {*templates}:
        form = next(form for form in FORMS if given <= set(form))
        return form, {key: columns.get(key, key) for key in form if key not in templates}
    *before_text, text = FORMS
    for form in before_text:
        if all(key in row for key in form):
            return form, {key: key for key in form}
    for form in before_text:
        if all(column in row for column in OTHER_NAMES[form[0]].values()):
            return form, OTHER_NAMES[form[0]]
    for form in (text, ("prompt", "completion")):
        if any(key in row for key in form):
            return form, {key: key for key in form}
    raise DataError(
        f"{place}: no 'messages', no 'prompt' and 'completion', no 'text'. Its columns: {', '.join(row) or 'none'}. "
        "Name the right ones, for example `columns: {prompt: question, completion: answer}`."
    )


def _beside_messages(row: Mapping[str, Any], tools: str, place: str) -> dict[str, Any]:
    """What a row gives the chat template beside its messages."""
    found: dict[str, Any] = {}
    for key, column, kind in ((TOOLS, tools, list), ("chat_template_kwargs", "chat_template_kwargs", dict)):
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            value = _parse_json(value.encode(), f"{place}, {column!r}")
        if not value:
            continue
        if not isinstance(value, kind):
            raise DataError(f"{place}: {column!r} must be a {kind.__name__}, got {shown(value)}.")
        found[key] = without_nulls(value)
    for column in ("functions", "function_call", "documents"):
        if row.get(column):
            raise DataError(
                f"{place}: {column!r} beside chat messages is not read; give functions as `tools`, each "
                '{"type": "function", "function": {…}}, or leave it out.'
            )
    return found


def _compiled(templates: Mapping[str, str]) -> dict[str, Any]:
    if not templates:
        return {}
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return {key: environment.from_string(text) for key, text in templates.items()}


def _made(template: Any, row: Mapping[str, Any], where: str) -> str:
    from jinja2 import TemplateError

    try:
        return template.render(row)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{where}: {error}. Its columns: {', '.join(row) or 'none'}.") from error


def _check_column(row: Mapping[str, Any], column: str, place: str, used: Collection[str] = ()) -> None:
    if column not in row:
        guess = nearest(column, [name for name in row if name not in used])
        raise DataError(f"{place}: no {column!r}.{guess} Its columns: {', '.join(row) or 'none'}.")


def _text(value: Any, column: str, place: str, purpose: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} must be text, got {shown(value)}.")
    if not value.strip():
        raise DataError(f"{place}: empty {column!r}; there is nothing to {purpose}.")
    return value


def _listed(values: Iterable[str]) -> str:
    values = list(values)
    more = ", …" if len(values) > _VALUES_SHOWN else ""
    return ", ".join(shown(value) for value in values[:_VALUES_SHOWN]) + more
