"""What a server serves: one mixture under several model names, and what is known of it while it runs."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dylora_moe.arguments import BASE
from dylora_moe.session import Session
from dylora_moe.skills.novelty import Novelty

from .engine import Engine
from .errors import ApiError
from .names import expert_named, model_names
from .prompts import Prompts
from .request import Token
from .schemas import Message
from .worker import Worker

logger = logging.getLogger(__name__)
NEAREST = 5
"""How many of the nearest skills are named."""


class Service:
    """A mixture that is being served.

    Args:
        session: the mixture, with its tokenizer and prompt format.
        name: how the routed mixture is called as a model; its experts are `name:expert`, the bare base `name:base`.
        engine: of the mixture.

    Attributes:
        worker: answers requests.
        written: how many tokens each expert has written: sums of routing weights, those of the base under `"base"`.
        ready: that the worker runs.
        temperature, top_p: of requests that ask for none: as the base's own generation does.
    """

    def __init__(self, session: Session, name: str, engine: Engine):
        self.session, self.name, self.engine = session, name, engine
        self.model, self.tokenizer = session.model, session.tokenizer
        self.worker = Worker(engine)
        self.written: defaultdict[str, float] = defaultdict(float)
        own: Any = self.model.get_base_model().generation_config  # pyright: ignore[reportCallIssue]
        sampled = bool(own.do_sample)
        self.temperature = 0.0 if not sampled else 1.0 if own.temperature is None else own.temperature
        self.top_p = 1.0 if not sampled or own.top_p is None else own.top_p
        self.ready = False
        self._prompts = Prompts(session.tokenizer, session.chat, engine.slot_length)
        self._tokenizing = asyncio.Lock()  # a fast tokenizer is not to be used by two threads at once
        self._reader = copy.deepcopy(session.tokenizer)  # novelty's own
        self._looking = asyncio.Lock()
        self._preparing: threading.Thread | None = None
        self._stop_preparing = threading.Event()
        self._unprepared: str | None = None

    def start(self) -> None:
        """Begin to answer, and to get novelty ready beside it."""
        self.worker.start()
        self.ready = True
        self.start_novelty()

    def start_novelty(self) -> None:
        """Get novelty ready in a thread, unless nothing was taught; after a change anew."""
        if self.model.skills and not (self._preparing is not None and self._preparing.is_alive()):
            self._preparing = threading.Thread(target=self._prepare, name="novelty", daemon=True)
            self._preparing.start()

    async def stop(self) -> None:
        """End."""
        self.ready = False
        self._stop_preparing.set()
        await self.worker.stop()

    # ------------------------------------------------------------------ models

    def models(self) -> dict[str, str | None]:
        """Model name → expert to force, None for the routed mixture."""
        leaving = self.engine.leaving
        return model_names(self.name, [name for name in self.model.expert_names if name not in leaving])

    def expert_of(self, model: str) -> str | None:
        """The expert that a model name forces, None for the routed mixture.

        Raises:
            ApiError: 404, with the names there are.
        """
        return expert_named(model, self.models())

    async def description(self) -> dict[str, Any]:
        """The mixture and its experts, as `GET /v1/experts` tells them; between two steps."""

        def in_turn() -> dict[str, Any]:
            with self.model.holder.lock.turn():
                return self._description()

        return await asyncio.to_thread(in_turn)

    def _description(self) -> dict[str, Any]:
        model, config = self.model, self.model.moe_config
        experts = []
        for name in model.expert_names:
            skill = model.skills.get(name)
            experts.append(
                {
                    "id": name,
                    "model": f"{self.name}:{name}",
                    "state": model.expert_states[name],
                    "frozen": name in model.frozen_experts,
                    "rank": model.lora_config(name).r,
                    "rows": skill.rows if skill else 0,
                    "tokens": round(self.written[name], 3),
                }
            )
        rest = {"state": BASE, "frozen": True, "rank": 0, "rows": 0, "tokens": round(self.written[BASE], 3)}
        return {
            "object": "list",
            "model": self.name,
            "granularity": config.granularity,
            "top_k": config.top_k,
            "router_type": config.router_type,
            "chat": self.session.chat,
            "slot_length": self.engine.slot_length,
            "routed": len(model.experts.masked) < model.router.num_outputs,
            "novelty": self.novelty_state,
            "data": [*experts, {"id": BASE, "model": f"{self.name}:{BASE}", **rest}],
        }

    def count(self, tokens: Sequence[Token]) -> None:
        """Add to `written`."""
        for token in tokens:
            for name, share in shares(token).items():
                self.written[name] += share

    # ------------------------------------------------------------------ prompts

    async def encode(self, prompt: str | list[Message]) -> tuple[int, ...]:
        """The ids of a text or a conversation; see `Prompts`.

        Raises:
            ApiError: 400, a prompt that cannot be encoded.
        """
        example = self._prompts.example(prompt, self.model.skills.separator)
        async with self._tokenizing:
            return await asyncio.to_thread(self._prompts.ids, example)

    # ------------------------------------------------------------------ novelty

    @property
    def novelty_state(self) -> str:
        """`none`, `preparing` or `ready`."""
        if not self.model.skills or self._unprepared is not None:
            return "none"
        return "preparing" if self._preparing is not None and self._preparing.is_alive() else "ready"

    async def novelty(self, prompts: Sequence[str]) -> list[tuple[Novelty, list[tuple[str, float]]]]:
        """What some prompts are, and the skills nearest to each.

        Raises:
            ApiError: 400 without a skill library, 503 until it is ready.
        """
        state = self.novelty_state
        if state == "none":
            why = self._unprepared or "nothing was taught; `dylora-moe teach` tells what its experts are for"
            raise ApiError(400, f"this mixture cannot say what is new: {why}.", code="no_skills")
        if state == "preparing":
            wait = {"Retry-After": "5"}
            raise ApiError(503, "novelty is getting ready; ask again in a few seconds.", code="preparing", headers=wait)
        rows = [{"prompt": prompt} for prompt in prompts]
        async with self._looking:
            try:
                return await asyncio.to_thread(self._novelty, rows)
            except ValueError as error:
                raise ApiError(400, str(error)) from error

    def _novelty(self, rows: list[dict[str, str]]) -> list[tuple[Novelty, list[tuple[str, float]]]]:
        found = self.model.novelty(rows, tokenizer=self._reader)
        nearest = self.model.nearest_skills(rows, tokenizer=self._reader)
        return [(one, near[:NEAREST]) for one, near in zip(found, nearest, strict=True)]

    def _prepare(self) -> None:
        def go_on(*_: Any) -> None:
            if self._stop_preparing.is_set():
                raise InterruptedError

        try:
            self.model.prepare_novelty(self._reader, progress=go_on)
        except InterruptedError:
            return
        except (ValueError, OSError) as error:
            logger.warning("novelty is off: %s", error)
            self._unprepared = str(error)


def shares(token: Token) -> dict[str, float]:
    """Expert → weight of the pass that predicted a token, and what it left to the base; without those of nothing."""
    found = {name: weight for name, weight in zip(token.experts, token.weights, strict=True) if weight > 0}
    rest = 1 - sum(found.values())
    return found | {BASE: rest} if rest > 1e-6 else found
