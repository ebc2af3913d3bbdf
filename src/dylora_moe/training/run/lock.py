"""One process at a time trains in a folder; the lock goes with the process, however it ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no locks that a killed process gives back in this way
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


class FolderLock:
    """The lock of a folder.

    Args:
        folder: made if it is missing, and removed again if nothing was written to it.
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / LOCK_FILE
        self.held = False

    @contextmanager
    def hold(self, shared: bool = False) -> Iterator[None]:
        """Keep others out within the block; inside another block of the same lock it does nothing.

        Args:
            shared: keep out only those who do not share.

        Raises:
            ValueError: another process holds the lock; the message has its id.
            OSError: the folder cannot be made.
        """
        if self.held or fcntl is None:
            yield
            return
        file = self._taken(shared)
        self.held = True
        try:
            yield
        finally:
            self.held = False
            if not shared:
                self.file.unlink(missing_ok=True)
            file.close()
            with suppress(OSError):  # there is something in it
                self.folder.rmdir()

    def _taken(self, shared: bool) -> IO[str]:
        assert fcntl is not None
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.file.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                file.close()
                raise ValueError(
                    f"{self.folder} is being trained by another process ({owner}). Wait for it or stop it, or give "
                    "another --output."
                ) from error
            except OSError as error:
                logger.warning("%s: no locks here (%s); see to it that only one process trains.", self.folder, error)
            with suppress(FileNotFoundError):
                if self.file.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    break
            file.close()  # its owner has just removed it
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        return file
