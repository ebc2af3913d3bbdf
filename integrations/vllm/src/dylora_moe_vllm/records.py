"""Which weights were in force when a token was written: kept per request while it runs, until somebody takes them.

A token is written by the logits of the position before it, so token j of an answer goes by the weights at position
P - 1 + j, P tokens of prompt. A position may be computed again (after preemption, or in the place of a rejected draft):
the last time counts. Shapes: T tokens of a step, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KEY = "dylora_routing"
"""Who wants a record sets this in a request's `SamplingParams.extra_args` (`vllm_xargs`), to a name to take it by."""

ENDED = 1024
"""Records of requests that have ended and that nobody took: more are forgotten, the oldest first."""


@dataclass
class Record:
    """What was in force in one request.

    Attributes:
        prompt: P, tokens of its prompt.
        steps: per step its positions, integers `[t]`, and their weights, `[t, E]`.
    """

    prompt: int
    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def weights(self, whole: bool = False) -> list[list[float] | None]:
        """Weights by position: from P - 1 on, or with `whole` from 0; None where none were computed.

        Raises:
            RuntimeError: a step left no weights, because layer k did not run in it as this module expects.
        """
        start = 0 if whole else self.prompt - 1
        rows: dict[int, list[float]] = {}
        for positions, weights in self.steps:
            rows.update(zip(positions.tolist(), weights.tolist(), strict=True))
        if any(weight != weight for row in rows.values() for weight in row):
            raise RuntimeError("a step of vLLM left no routing weights: its model was compiled without recording them.")
        return [rows.get(position) for position in range(start, max(rows, default=-1) + 1)]


class Records:
    """The records of an engine's requests.

    Args:
        ended: how many are kept of requests that have ended.
    """

    def __init__(self, ended: int = ENDED):
        self._most_ended = ended
        self._by_key: dict[str, Record] = {}
        self._key_of: dict[str, str] = {}  # by the engine's own id, while a request runs
        self._ended: dict[str, None] = {}  # keys, the oldest first

    def begin(self, request: str, key: str, prompt: int) -> None:
        """Keep a record of a request from now on; one that begins again, after preemption, goes on with its own.

        Args:
            request: the engine's id.
            key: to take it by.
            prompt: P.
        """
        if request not in self._key_of:
            self._key_of[request] = key
            self._by_key[key] = Record(prompt)

    def wanted(self, requests: Iterable[str]) -> bool:
        """Whether a record is kept of any of them."""
        return any(request in self._key_of for request in requests)

    def add(self, order: Sequence[str], tokens: Mapping[str, int], positions: Tensor, weights: Tensor) -> None:
        """Take in what a step did.

        Args:
            order: requests, as their tokens follow each other in the step.
            tokens: how many each had.
            positions: `[T]` or longer, in the tokens' requests.
            weights: `[T, E]` or longer; copied.
        """
        spans, start = {}, 0
        for request in order:
            stop = start + tokens[request]
            if (record := self._by_key.get(self._key_of.get(request, ""))) is not None:
                spans[start, stop] = record
            start = stop
        if not spans:
            return
        # one copy of all rows that count, in which each request has its own
        taken = [torch.cat([whole[start:stop] for start, stop in spans]) for whole in (positions, weights)]
        sizes = [stop - start for start, stop in spans]
        for record, *step in zip(spans.values(), *(rows.split(sizes) for rows in taken), strict=True):
            record.steps.append((step[0], step[1]))

    def end(self, requests: Iterable[str]) -> None:
        """Requests that will have no further step."""
        for request in requests:
            if (key := self._key_of.pop(request, None)) in self._by_key:
                self._ended[key] = None
        while len(self._ended) > self._most_ended:
            oldest = next(iter(self._ended))
            del self._ended[oldest], self._by_key[oldest]

    def take(self, key: str) -> Record | None:
        """The record of a request, which is forgotten; None if there is none of that key."""
        self._ended.pop(key, None)
        return self._by_key.pop(key, None)


def entry(token: int, text: str, weights: Sequence[float], experts: Sequence[str]) -> dict[str, Any]:
    """What an answer says of one token: as `dylora-moe serve` does, with the token's id in the place of its bytes.

    Args:
        token: its id.
        text: its own.
        weights: `[E]`.
        experts: their names.
    """
    shares = {name: weight for name, weight in zip(experts, weights, strict=True) if weight > 0}
    if (rest := 1 - sum(shares.values())) > 1e-6:
        shares["base"] = rest
    expert = max(shares, key=lambda name: shares[name])
    return {
        "token": text,
        "token_id": token,
        "expert": expert,
        "weights": {name: round(share, 6) for name, share in shares.items()},
    }
