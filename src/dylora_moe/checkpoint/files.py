"""Reading checkpoint files with errors that name them, and replacing files and folders as a whole."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_PICKLES = (
    "adapter_model.bin",
    "adapter_model.pt",
    "adapter_model.pth",
    "pytorch_model.bin",
    "router.pt",
    "router.bin",
)
_DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")


_LFS_POINTER = b"version https://git-lfs"
_CURRENT, _SWAP = -100, 2  # AT_FDCWD, and RENAME_EXCHANGE of renameat2 (RENAME_SWAP of renamex_np is the same)


class CheckpointError(ValueError):
    """A checkpoint or adapter that cannot be used; the message names the file and what was expected."""


def local_folder(source: str | Path, files: list[str], **download: Any) -> Path:
    """A local folder for `source`: itself, or the download of a hub id. `files` are named in the error.

    Raises:
        TypeError: a `download` option that huggingface_hub's `snapshot_download` is not passed.
    """
    unknown = sorted(set(download) - set(_DOWNLOAD))
    if unknown:
        raise TypeError(f"unknown arguments {', '.join(unknown)}; a download takes {', '.join(_DOWNLOAD)}.")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file; expected a folder with {', '.join(files)}.")
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(
            f"{source}: no such folder; expected one with {', '.join(files)}, or a hub id (owner/name)."
        )
    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.md"], **download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{source}: no such folder, and the hub did not deliver it: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`."""
    try:
        text = file.read_text(encoding="utf-8")
        _check_content(file, text[: len(_LFS_POINTER)].encode())
        fields = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing.") from error
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{file} cannot be read as JSON: it is nested too deeply.") from error
    except (OSError, ValueError) as error:  # not text, not JSON, a number of thousands of digits
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds {type(fields).__name__}; expected a JSON object.")
    return fields


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors `file`; a pickle in its place is refused."""
    if not file.is_file():
        pickles = [name for name in _PICKLES if (file.parent / name).exists()]
        if pickles:
            raise CheckpointError(
                f"{file.parent / pickles[0]} is a pickle, which can run code when loaded, and is refused; convert it "
                f"to {file.name} (safetensors) where it was made."
            )
        raise CheckpointError(f"{file} is missing.")
    try:
        with file.open("rb") as opened:
            _check_content(file, opened.read(len(_LFS_POINTER)))
        return load_file(file)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}") from error


def _check_content(file: Path, start: bytes) -> None:
    """Raise `CheckpointError` if a file that begins with `start` only stands for one that was never fetched."""
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in the clone it comes from, or "
            "download it again."
        )


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file as a whole: it is the old one or the new one, never half of it."""
    part = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replacing(target: str | Path, owned: Collection[str]) -> Iterator[Path]:
    """Give a temporary folder beside `target` to write to, then put it in the place of `target`.

    Entries of an older `target` whose names are `owned` are replaced or removed, all others kept. On any error the
    old folder stays as it was and the temporary one is gone.

    Raises:
        CheckpointError: `target` is a file, or holds an entry that is not `owned` where a new one must go.
    """
    target = Path(target).resolve()  # through links, so that the folder they lead to is replaced and not the link
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield folder
        for entry in folder.iterdir():
            if entry.name not in owned and (target / entry.name).exists():
                raise CheckpointError(
                    f"{target / entry.name} is in the way and was not written by a mixture; choose another folder."
                )
        folder.chmod(_mode(target))  # mkdtemp makes it private
        _swap(folder, target, owned)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mode(target: Path) -> int:
    """The permissions of a folder, or of one that is to be made."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode) | stat.S_IRWXU  # it is filled after this
    mask = os.umask(0)
    os.umask(mask)
    return 0o777 & ~mask


def _swap(folder: Path, target: Path, owned: Collection[str]) -> None:
    if not target.exists():
        folder.rename(target)
        return
    if target == Path.cwd() or target in Path.cwd().parents or os.path.ismount(target):
        _replace_entries(folder, target, owned)  # a folder somebody stands in, or mounted, cannot be renamed
        return
    for entry in target.iterdir():
        if entry.name not in owned:
            _link(entry, folder / entry.name)
    if _exchange(folder, target):  # what was there is in `folder` now
        return
    old = folder.with_suffix(".old")
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _link(entry: Path, place: Path) -> None:
    """Have a file or folder in another place of the same disk as well, without a second copy of its content."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, place, symlinks=True, copy_function=_link_file)
    else:
        _link_file(entry, place)


def _link_file(file: str | Path, place: str | Path) -> None:
    try:
        os.link(file, place, follow_symlinks=False)
    except OSError:  # a disk without hard links
        shutil.copy2(file, place, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Have two folders change places in one step, which a killed process has done or not; False where none does it."""
    if sys.platform == "win32":
        return False
    library, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(one), os.fsencode(other))
    if hasattr(library, "renameat2"):
        return library.renameat2(_CURRENT, names[0], _CURRENT, names[1], _SWAP) == 0
    return hasattr(library, "renamex_np") and library.renamex_np(*names, _SWAP) == 0


def _replace_entries(folder: Path, target: Path, owned: Collection[str]) -> None:
    """Replace the owned entries of `target` one by one; the descriptions go out first and come in last.

    All is on the disk of `target` before the first one goes, so that only names change then.
    """
    inside = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=target))
    new, old, done = inside / "new", inside / "old", []
    try:
        shutil.move(str(folder), str(new))
        old.mkdir()
        leaving = sorted((target / name for name in owned), key=lambda entry: entry.suffix != ".json")
        coming = sorted(new.iterdir(), key=lambda entry: entry.suffix == ".json")
        moves = [(entry, old / entry.name) for entry in leaving if os.path.lexists(entry)]
        for entry, place in [*moves, *((entry, target / entry.name) for entry in coming)]:
            entry.rename(place)
            done.append((entry, place))
    except BaseException:
        for entry, place in reversed(done):
            place.rename(entry)
        raise
    finally:
        shutil.rmtree(inside, ignore_errors=True)
