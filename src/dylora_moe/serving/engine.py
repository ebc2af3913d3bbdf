"""Many requests to one mixture at once: each prompt is read by itself, then all go on together, token by token.

A step reads a piece of a prompt and writes one token for every request that has been read. Routed and forced requests
share the pass: a row's expert is its own. The model belongs to the engine only during a step, so that others (a look at
the novelty of a prompt, a hot change) take their turns between two.

Shapes: B batch, S tokens of a pass, V vocabulary, E experts, n router outputs.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dylora_moe.arguments import BASE, check_experts
from dylora_moe.model import DyLoraMoE
from dylora_moe.routing.call import Call
from dylora_moe.routing.decision import largest
from dylora_moe.routing.granularity import GRANULARITIES, Granularity

from .passes import Passes
from .request import Alternative, Event, Handle, Request, Token
from .sampling import log_probabilities, sampled
from .slots import SlotCache
from .text import TextStream, TokenBytes

logger = logging.getLogger(__name__)
MOST_BY_DEFAULT = 2048
"""How many tokens a request may have where nobody says: so much memory is taken for every slot."""


@dataclass(eq=False)
class _Running:
    """One request on its way.

    Attributes:
        handle: whose it is.
        generator: what it samples with.
        tensor: the forced expert's first parameter, by which it is known whatever it is called; None for no expert.
        expert: what it is forced to now, after renames; None if it is routed.
        ids: of the prompt and of what was written.
        text: what it has written.
        held: `[1, 1, n]` scores where the prompt decides.
    """

    handle: Handle
    generator: torch.Generator
    tensor: Tensor | None
    expert: str | None
    ids: list[int]
    text: TextStream
    held: Tensor | None = None

    @classmethod
    def of(cls, handle: Handle, model: DyLoraMoE) -> _Running:
        """The beginning of a request to `model`."""
        request = handle.request
        generator = torch.Generator(device=model.device)
        generator.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
        forced = request.expert not in (None, BASE)
        tensor = model.expert_tensors(str(request.expert))[0].tensor if forced else None
        return cls(
            handle,
            generator,
            tensor,
            request.expert,
            list(request.prompt),
            TextStream(request.stop, request.stop_past_blanks),
        )

    @property
    def written(self) -> int:
        """How many tokens of the answer there are."""
        return len(self.ids) - len(self.handle.request.prompt)


@dataclass(eq=False)
class _Reading:
    """A request that is being read, up to `seen` of its tokens, into a cache of its own."""

    running: _Running
    cache: Cache
    seen: int = 0


@dataclass
class _Change:
    """Something to do between two steps, when no request is forced to one of `leaving` any more."""

    do: Callable[[], Any]
    leaving: tuple[str, ...]
    done: Future = field(default_factory=Future)


class Engine:
    """A mixture that answers many requests at once.

    `admit`, `cancel` and `change` may be called from any thread; what they ask for happens in the next `step`, of which
    one thread makes one after the other.

    Args:
        model: the mixture, in evaluation mode.
        tokenizer: its tokenizer, with a fast backend.
        slots: how many requests are answered at a time; others wait.
        slot_length: how many tokens, prompt and answer together, one may have; default 2048, or the base's positions.
        chunk: how many tokens of prompts are read in a step.

    Attributes:
        chunked: whether a prompt is read in pieces; not where a base then answers otherwise.
        eos: the ids that end an answer.
        token_bytes: id → the bytes of a token.

    Raises:
        ValueError: a base whose requests cannot be served together, more tokens than it has positions, or a model in
            training mode.
    """

    def __init__(
        self, model: DyLoraMoE, tokenizer: Any, slots: int = 8, slot_length: int | None = None, chunk: int = 256
    ):
        self._passes = Passes(model)
        config = self._passes.config
        positions = getattr(config, "max_position_embeddings", None) or math.inf
        length = int(min(positions, MOST_BY_DEFAULT)) if slot_length is None else slot_length
        for name, value in (("slots", slots), ("slot_length", length), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 is needed.")
        self.model, self.slots, self.slot_length, self.chunk = model, slots, length, chunk
        if length > positions:
            raise ValueError(f"slot_length={length}: the base has {positions} positions; serve no more.")
        if model.training:
            raise ValueError(
                "the mixture is in training mode, which routes and drops out otherwise; call model.eval()."
            )
        self.token_bytes = TokenBytes(tokenizer)
        ends = self._passes.base.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        self.eos = frozenset(id for id in (*ends, tokenizer.eos_token_id) if id is not None)
        self._arrived: deque[Handle] = deque()  # since the last step, whose thread alone sees what follows
        self._waiting: deque[_Running] = deque()
        self._reading: _Reading | None = None
        self._live: list[_Running] = []
        self._changes: deque[_Change] = deque()
        self._cache = SlotCache(slots, length)
        self._made_of = self._state
        self._work = threading.Event()
        self.chunked = self._passes.agree_in_pieces(min(40, length))

    # ------------------------------------------------------------------ what a caller does

    def admit(self, request: Request) -> Handle:
        """Queue a request.

        Raises:
            ValueError: an unknown expert or one that is leaving, values out of range, more tokens than fit, or a routed
                request while no expert is routed.
        """
        model = self.model
        request.check(self._passes.config.vocab_size, self.slot_length)
        check_experts(request.expert, model.expert_names, None)
        if request.expert in self.leaving:
            raise ValueError(f"expert {request.expert!r} is being removed; it takes no new request.")
        if request.expert is None and len(model.experts.masked) == model.router.num_outputs:
            raise ValueError(f"no expert is routed yet; force one of {', '.join(model.expert_names)}.")
        handle = Handle(request)
        self._arrived.append(handle)
        self._work.set()
        return handle

    def cancel(self, handle: Handle) -> None:
        """Let a request end with the next step; one that has ended stays as it is."""
        handle.cancelled = True
        self._work.set()

    def change(self, do: Callable[[], Any], leaving: Sequence[str] = ()) -> Future:
        """Do something with the mixture between two steps.

        Routed requests go on with what their cache was made of; where the prompt or all earlier tokens decide, or new
        experts need a routing pass, they are read again under the changed mixture first. A request forced to an expert
        that is then gone ends as cancelled.

        Args:
            do: what to do; changes the experts, say.
            leaving: experts that it removes: it waits until the requests forced to them have ended, and no new one is
                admitted.

        Returns:
            what becomes of it: its result or its error; cancelling it in time leaves everything as it is.
        """
        change = _Change(do, tuple(leaving))
        self._changes.append(change)
        self._work.set()
        return change.done

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, at most so many seconds, until there is something to do for `step`; whether there is."""
        return self._work.wait(timeout)

    @property
    def leaving(self) -> set[str]:
        """The experts that are being removed; they take no new request."""
        return {name for change in list(self._changes) for name in change.leaving}

    @property
    def live(self) -> int:
        """How many requests are being read or answered."""
        return len(self._live) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting) + len(self._arrived)

    @property
    def unread(self) -> int:
        """How many requests have not been read to the end of their prompt."""
        return self.waiting + (self._reading is not None)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Make the changes that are due, read a piece of a prompt, and write one token for every request that was read.

        Returns:
            what came of it, in order.
        """
        self._work.clear()
        with self.model.holder.lock.turn():
            events = self._receive()
            events += self._make_changes()
            events += self._drop_cancelled()
            events += self._read()
            events += self._write()
        if self._live or self._reading or self._waiting or self._changes:
            self._work.set()
        return events

    # ------------------------------------------------------------------ changes

    def _receive(self) -> list[Event]:
        events = []
        while self._arrived:
            handle = self._arrived.popleft()
            try:
                self._waiting.append(_Running.of(handle, self.model))
            except ValueError as error:  # its expert has gone since it was admitted
                events.append(Event(handle, finish_reason="cancelled", why=str(error)))
        return events

    def _make_changes(self) -> list[Event]:
        while self._changes:
            change = self._changes[0]
            if any(running.expert in change.leaving for running in self._all()):
                break
            if change.done.set_running_or_notify_cancel():
                try:
                    with torch.enable_grad():
                        result = change.do()
                except Exception as error:  # noqa: BLE001  # it belongs to whoever asked for the change
                    change.done.set_exception(error)
                else:
                    change.done.set_result(result)
            self._changes.popleft()
        return self._follow() if self._state != self._made_of else []

    @property
    def _state(self) -> tuple[int, bool]:
        """How often the experts were changed, and whether they need a routing pass."""
        return self.model.holder.changes, self.model.hooks.needs_first_pass

    def _follow(self) -> list[Event]:
        """Bring what was made of the experts up to date."""
        needed_pass, self._made_of = self._made_of[1], self._state
        self._passes.forget()
        names = {id(self.model.expert_tensors(name)[0].tensor): name for name in self.model.expert_names}
        events = []
        for running in self._all():
            if running.tensor is not None:
                gone, running.expert = running.expert, names.get(id(running.tensor))
                if running.expert is None:
                    events += self._end(running, f"the expert {gone!r} was removed")
        if self._granularity.per_sequence or self._granularity.cumulative or self._made_of[1] > needed_pass:
            self._read_again()
        return events

    def _read_again(self) -> None:
        """Send the routed requests back to be read: their state is none that the mixture would go on from."""
        back = [running for running in self._live if running.expert is None]
        if self._reading is not None and self._reading.running.expert is None:
            back.append(self._reading.running)
        for running in back:
            self._release(running)
            running.held = None
        self._waiting.extendleft(reversed(back))

    def _drop_cancelled(self) -> list[Event]:
        return [event for running in self._all() if running.handle.cancelled for event in self._end(running)]

    def _all(self) -> list[_Running]:
        reading = [] if self._reading is None else [self._reading.running]
        return [*self._live, *reading, *self._waiting]

    def _end(self, running: _Running, why: str | None = None) -> list[Event]:
        """Cancel a request."""
        self._release(running)
        return [Event(running.handle, finish_reason="cancelled", why=why)]

    def _release(self, running: _Running) -> None:
        """Give back what a request holds."""
        if running in self._live:
            row = self._live.index(running)
            self._cache.leave(row)
            last = self._live.pop()
            if last is not running:
                self._live[row] = last
        elif self._reading is not None and self._reading.running is running:
            self._reading = None
        else:
            self._waiting.remove(running)

    # ------------------------------------------------------------------ reading

    def _read(self) -> list[Event]:
        events, budget = [], self.chunk
        while budget > 0:
            if self._reading is None:
                if not self._waiting or len(self._live) >= self.slots:
                    break
                self._reading = _Reading(self._waiting.popleft(), self._passes.new_cache())
            reading = self._reading
            size = len(reading.running.ids) - reading.seen
            if self.chunked:
                size = min(size, self.chunk)
            budget -= size
            try:
                logits, weights = self._read_piece(reading, size)
            except Exception as error:  # one request must not end those of others
                logger.exception("a prompt of %d tokens could not be read", len(reading.running.ids))
                events += self._end(reading.running, f"{type(error).__name__}: {error}")
                continue
            if reading.seen == len(reading.running.ids):
                self._reading = None
                self._cache.join(reading.cache, reading.seen)
                self._live.append(reading.running)
                events += self._extend([reading.running], logits, weights)
        return events

    def _read_piece(self, reading: _Reading, size: int) -> tuple[Tensor, Tensor]:
        running, start, end = reading.running, reading.seen, reading.seen + size
        prompt = len(running.handle.request.prompt)
        device = self.model.device
        ids = torch.tensor([running.ids], device=device)
        positions = torch.arange(len(running.ids), device=device)[None]
        routed = running.expert is None
        if routed and running.held is None and self._granularity.per_sequence and end < prompt:
            running.held = self._passes.prompt_scores(ids[:, :prompt], positions[:, :prompt])
        call = Call(experts=running.expert, prompt_length=prompt, held=running.held)
        mask = torch.ones_like(ids[:, :end])
        result = self._passes.run(call, ids[:, start:end], positions[:, start:end], mask, reading.cache)
        running.held, reading.seen = call.held, end
        return result

    # ------------------------------------------------------------------ writing

    def _write(self) -> list[Event]:
        rows = list(self._live)
        if not rows:
            return []
        device = self.model.device
        self._cache.advance()
        ids = torch.tensor([[running.ids[-1]] for running in rows], device=device)
        call = Call(experts=[running.expert for running in rows], held=self._held(rows))
        mask, positions = self._cache.mask(device), self._cache.positions(device)
        try:
            logits, weights = self._passes.run(call, ids, positions, mask, self._cache)
        except Exception as error:  # those who wait are answered
            logger.exception("a step of %d requests failed", len(rows))
            why = f"{type(error).__name__}: {error}"
            return [event for running in rows for event in self._end(running, why)]
        return self._extend(rows, logits, weights)

    def _held(self, rows: Sequence[_Running]) -> Tensor | None:
        """The held scores `[B, 1, n]`, of which those of forced rows mean nothing; None where none are held."""
        known = next((running.held for running in rows if running.held is not None), None)
        if known is None:
            return None
        return torch.cat([torch.zeros_like(known) if running.held is None else running.held for running in rows])

    def _extend(self, rows: Sequence[_Running], logits: Tensor, weights: Tensor) -> list[Event]:
        """Give each request its next token, by `logits [B, V]`, predicted under `weights [B, E]`."""
        best, events, experts = logits.argmax(-1).tolist(), [], tuple(self.model.expert_names)
        for running, row, id, shares in zip(rows, logits, best, weights.tolist(), strict=True):
            request = running.handle.request
            if request.temperature > 0:
                id = sampled(row, request.temperature, request.top_p, running.generator)
            event = self._next(running, row, id, tuple(shares), experts)
            if event.finish_reason is not None:
                self._release(running)
            if event.finish_reason is not None or event.text or event.tokens:
                events.append(event)
        return events

    def _next(
        self, running: _Running, logits: Tensor, id: int, weights: tuple[float, ...], experts: tuple[str, ...]
    ) -> Event:
        if id in self.eos:
            return Event(running.handle, *running.text.rest(), "stop")
        asked = running.handle.request.logprobs
        logprob, others = (None, []) if asked is None else log_probabilities(logits, id, asked)
        alternatives = tuple(Alternative(other, self.token_bytes(other), value) for other, value in others)
        expert = largest(weights, experts)
        token = Token(id, self.token_bytes(id), weights, experts, expert, logprob, alternatives)
        running.ids.append(id)
        text, tokens, stopped = running.text.add(token)
        if stopped:
            return Event(running.handle, text, tokens, "stop")
        if running.written == running.handle.request.max_tokens:
            rest, others = running.text.rest()
            return Event(running.handle, text + rest, tokens + others, "length")
        return Event(running.handle, text, tokens)

    @property
    def _granularity(self) -> Granularity:
        return GRANULARITIES[self.model.moe_config.granularity]
