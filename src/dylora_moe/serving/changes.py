"""Changes of a mixture while it is being served: experts come, go, get other names, skills are learnt.

What takes long (training, reading texts) is done by a process of its own on the checkpoint, as the command line does
it; between two steps of the engine only the finished expert, router and library are taken over.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, status

from dylora_moe.checkpoint.mixture import CONFIG_FILE
from dylora_moe.config import check_expert_name
from dylora_moe.training.run.lock import FolderLock

from .errors import ApiError
from .metrics import Metrics
from .schemas import ExpertAsked, LearnAsked, RenameAsked, RowAsked
from .service import Service

logger = logging.getLogger(__name__)
TOLD = 20
"""How many of the last lines of a process are told."""
KEPT = 100
"""How many finished jobs are remembered."""
PATH = re.compile(r"(?<![\w.~/:<-])/(?:[^\s/'\"]+/)+")
"""The folders of an absolute path, without its last part; no part of a URL."""
PATIENCE = 30.0
"""Seconds that a process has to end when the server does."""


@dataclass
class Job:
    """A skill that is being learnt, or was.

    Attributes:
        id: by which it is asked for.
        name: of the expert.
        status: `running`, `done`, `failed` or `nothing new`.
        message: what the process said last.
        started: seconds on the monotonic clock.
    """

    name: str
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(8)}")
    status: str = "running"
    message: str = ""
    started: float = field(default_factory=time.monotonic)

    def as_dict(self) -> dict[str, Any]:
        """For an answer."""
        return {"id": self.id, "name": self.name, "status": self.status, "message": self.message}


class Changes:
    """Changes a served mixture and the checkpoint it came from, one change after the other.

    Args:
        service: what is served.
        folder: the checkpoint's, which follows every change.
        adapters: the folder whose subfolders may be added as experts; None for none.
        base: what the checkpoint was loaded with instead of the base it names.

    Raises:
        ValueError: a folder that cannot be written.
    """

    def __init__(self, service: Service, folder: Path, adapters: Path | None = None, base: str | None = None):
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"{folder} cannot be written, so that changes would be lost; serve a local copy of it.")
        if adapters is not None and not adapters.is_dir():
            raise ValueError(f"--adapters {adapters}: no such folder.")
        self.service, self.folder, self.adapters, self.base = service, folder, adapters, base
        self.jobs: dict[str, Job] = {}
        self._one = asyncio.Lock()
        self._learning: Job | None = None
        self._tasks: set[asyncio.Task] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._seen = self._stamp()

    def state(self) -> dict[str, Any]:
        """What `GET /v1/experts` tells of it."""
        job = self._learning
        learning = None if job is None else {"name": job.name, "seconds": round(time.monotonic() - job.started, 1)}
        return {"changes": True, "learning": learning}

    async def stop(self) -> None:
        """End what is going on; the checkpoint is as before or after it."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), PATIENCE)
            except TimeoutError:
                self._process.kill()
        for task in self._tasks:
            task.cancel()

    def kill(self) -> None:
        """End what is going on at once, where nothing can be waited for any more."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    # ------------------------------------------------------------------ what can be done

    async def add(self, asked: ExpertAsked) -> None:
        """Add an adapter as an expert; with rows it is routed from then on.

        Raises:
            ApiError: 400 for a name or an adapter that cannot be, 409 while something else changes the mixture.
        """
        self._check_name(asked.name)
        adapter = self._adapter(asked.adapter)
        async with self._alone():
            self._check_name(asked.name)
            if asked.rows:
                done = await self._run("import", [asked.name, str(adapter), "--texts"], asked.rows)
                if done.code:
                    raise ApiError(400, done.told, code="import_failed")
                await self._follow()
            else:
                await self._change_and_save(lambda: self.service.model.add_expert(asked.name, adapter))

    async def remove(self, name: str) -> None:
        """Take an expert out, when the requests that are forced to it have ended.

        Raises:
            ApiError: 400 for the last one, 404 for an unknown one, 409 as `add`.
        """
        self._check_known(name)
        async with self._alone():
            self._check_known(name)
            try:
                self.service.model.experts.rest_without(name)
            except ValueError as error:
                raise ApiError(400, str(error), "name") from error
            await self._change_and_save(lambda: self.service.model.remove_expert(name), [name])

    async def rename(self, name: str, to: str) -> None:
        """Give an expert another name; requests to the old one end as they began.

        Raises:
            ApiError: 400 for a name that cannot be, 404 for an unknown one, 409 as `add`.
        """
        self._check_known(name)
        self._check_name(to)
        async with self._alone():
            self._check_known(name)
            await self._change_and_save(lambda: self.service.model.rename_expert(name, to))
        self.service.written[to] += self.service.written.pop(name, 0.0)

    def learn(self, asked: LearnAsked, noted: Callable[[str], None]) -> Job:
        """Begin to learn a skill.

        Args:
            asked: its rows.
            noted: is told the status at the end.

        Raises:
            ApiError: 400 for a name that cannot be, 409 as `add`.
        """
        self._check_name(asked.name)
        self._check_free()
        job = Job(asked.name)
        for old in list(self.jobs)[: max(len(self.jobs) - KEPT, 0)]:
            del self.jobs[old]
        self.jobs[job.id], self._learning = job, job
        task = asyncio.create_task(self._learn(asked, job, noted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _learn(self, asked: LearnAsked, job: Job, noted: Callable[[str], None]) -> None:
        options = ["--name", asked.name, *(["--all"] if asked.everything else [])]
        options += [] if asked.steps is None else ["--steps", str(asked.steps)]
        try:
            async with self._one:
                self._check_unchanged()
                done = await self._run("learn", options, asked.rows)
                if not done.code:
                    await self._follow()
            job.status = "failed" if done.code else "done"
            if not done.code and asked.name not in self.service.model.expert_names:
                job.status = "nothing new"
            job.message = done.told
        except ApiError as error:
            job.status, job.message = "failed", error.message
        except asyncio.CancelledError:
            job.status, job.message = "failed", "the server is shutting down"
            raise
        except Exception as error:
            logger.exception("learning %s failed", asked.name)
            job.status, job.message = "failed", type(error).__name__
        finally:
            self._learning = None
            noted(job.status)

    # ------------------------------------------------------------------ how

    def _alone(self) -> asyncio.Lock:
        self._check_free()
        return self._one

    def _check_free(self) -> None:
        if self._learning is not None:
            busy = f"{self._learning.name!r} is being learnt, which changes the mixture; wait until it is done."
            raise ApiError(409, busy, code="learning", headers={"Retry-After": "10"})
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if not self._one.locked():
            self._check_stamp()

    def _check_stamp(self) -> None:
        if self._stamp() != self._seen:
            raise ApiError(409, "the checkpoint was changed by others; restart the server to serve it.", code="changed")

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = (self.folder / CONFIG_FILE).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _check_name(self, name: str) -> None:
        model = self.service.model
        try:
            check_expert_name(name, taken=model.expert_names, base=model.get_base_model())
        except ValueError as error:
            raise ApiError(400, str(error), "name") from error

    def _check_known(self, name: str) -> None:
        if name not in self.service.model.expert_names:
            there = ", ".join(self.service.model.expert_names)
            raise ApiError(404, f"no expert {name[:200]!r}; there are {there}.", "name", "expert_not_found")

    def _adapter(self, name: str) -> Path:
        if self.adapters is None:
            raise ApiError(400, "the server was started without --adapters FOLDER, from which experts are added.")
        names = sorted(each.name for each in self.adapters.iterdir() if each.is_dir())
        if name not in names:
            there = ", ".join(names) or "nothing"
            raise ApiError(
                400, f"no adapter {name[:200]!r} in the server's folder of adapters; it has {there}.", "adapter"
            )
        return self.adapters / name

    async def _change(self, do: Callable[[], Any], leaving: Sequence[str] = ()) -> None:
        """Do something between two steps of the engine."""
        try:
            await asyncio.shield(asyncio.wrap_future(self.service.engine.change(do, leaving)))
        except (ValueError, OSError) as error:
            raise ApiError(400, self._without_paths(str(error))) from error

    async def _change_and_save(self, do: Callable[[], Any], leaving: Sequence[str] = ()) -> None:
        """Change the mixture and bring the checkpoint up to date; nobody else writes to it from before until after."""

        def unless_changed() -> None:
            self._check_stamp()  # by who takes no lock, while this waited
            do()

        with ExitStack() as stack:
            try:
                stack.enter_context(FolderLock(self.folder).hold())
            except ValueError as error:
                busy = "another process is changing the checkpoint; try again when it has ended."
                raise ApiError(409, busy, code="changed") from error
            except OSError as error:
                logger.exception("the checkpoint cannot be written")
                raise ApiError(500, "the checkpoint cannot be written; the log has the reason.") from error
            await self._change(unless_changed, leaving)
            await self._save()

    async def _save(self) -> None:
        try:
            await asyncio.to_thread(self.service.model.save_pretrained, self.folder)
        except (ValueError, OSError) as error:
            logger.exception("the changed mixture could not be saved")
            raise ApiError(500, "the change is in force, but could not be saved; the log has the reason.") from error
        finally:
            self._seen = self._stamp()

    async def _follow(self) -> None:
        """Take over what the checkpoint has that the mixture lacks."""
        self._seen = self._stamp()
        await self._change(lambda: self.service.model.follow(self.folder))
        self.service.start_novelty()

    async def _run(self, command: str, words: Sequence[str], rows: Sequence[RowAsked]) -> _Done:
        """Run one of the commands of the command line on the checkpoint, with a file of rows."""
        with tempfile.TemporaryDirectory(prefix="dylora-moe-") as work:
            file = Path(work) / "rows.jsonl"
            lines = (json.dumps(row.model_dump(), ensure_ascii=False) for row in rows)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            further = [] if self.base is None else ["--base", self.base]
            place = [str(self.folder), str(file)] if command == "learn" else [str(self.folder)]
            rest = list(words) if command == "learn" else [*words, str(file)]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "dylora_moe", command, *place, *rest, *further),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
                preexec_fn=_step_back if hasattr(os, "nice") else None,
                start_new_session=True,  # Ctrl-C is the server's, which ends the process in its turn
            )
            self._process = process
            try:
                output = (await process.communicate())[0].decode("utf-8", "replace")
            finally:
                if process.returncode is None:
                    process.kill()
                self._process = None
        logger.info("%s: exit status %s\n%s", command, process.returncode, output)
        told = "\n".join(line.rstrip() for line in output.splitlines() if line.strip())
        told = self._without_paths(told.replace(work, ""), TOLD) or f"it ended with {process.returncode}"
        return _Done(process.returncode or 0, told)

    def _without_paths(self, text: str, lines: int | None = None) -> str:
        """A message that tells nothing of where things lie on this machine."""
        for folder, name in ((self.adapters, "ADAPTERS"), (self.folder, "DIRECTORY"), (Path.home(), "~")):
            if folder is not None:
                text = text.replace(str(folder.resolve()), name).replace(str(folder), name)
        text = PATH.sub("", text)
        return "\n".join(text.splitlines()[-lines:]) if lines else text


@dataclass
class _Done:
    """How a process ended, and what it said."""

    code: int
    told: str


def _step_back() -> None:
    os.nice(10)  # those who wait for an answer come first


def add_routes(app: FastAPI, changes: Changes, metrics: Metrics, errors: dict[int | str, dict[str, Any]]) -> None:
    """The routes by which a running mixture is changed."""
    errors = {**errors, 409: {"description": "Something else is changing the mixture."}}

    async def counted(kind: str, change: Awaitable[None]) -> dict[str, Any]:
        outcome = "failed"
        try:
            await change
            outcome = "done"
        finally:
            metrics.changes.labels(kind, outcome).inc()
        return await changes.service.description() | changes.state()

    @app.post("/v1/experts", responses=errors)
    async def add(asked: ExpertAsked) -> dict[str, Any]:
        """Add an adapter as an expert; with rows it is routed from then on."""
        return await counted("add", changes.add(asked))

    @app.delete("/v1/experts/{name}", responses=errors)
    async def remove(name: str) -> dict[str, Any]:
        """Take an expert out, when the requests that are forced to it have ended."""
        return await counted("remove", changes.remove(name))

    @app.post("/v1/experts/{name}/rename", responses=errors)
    async def rename(name: str, asked: RenameAsked) -> dict[str, Any]:
        """Give an expert another name."""
        return await counted("rename", changes.rename(name, asked.to))

    @app.post("/v1/learn", status_code=status.HTTP_202_ACCEPTED, responses=errors)
    async def learn(asked: LearnAsked) -> dict[str, Any]:
        """Begin to learn a skill; `GET /v1/learn/{id}` tells how it goes."""
        return changes.learn(asked, lambda outcome: metrics.changes.labels("learn", outcome).inc()).as_dict()

    @app.get("/v1/learn/{id}", responses=errors)
    async def job(id: str) -> dict[str, Any]:
        """How learning a skill goes."""
        if id not in changes.jobs:
            raise ApiError(404, f"no job {id[:200]!r}.", "id", "job_not_found")
        return changes.jobs[id].as_dict()
