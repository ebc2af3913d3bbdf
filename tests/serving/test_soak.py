"""Many clients at once, some of whom leave, some of whom ask for what cannot be, while experts come and go."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
import torch

from dylora_moe import DyLoraMoE
from dylora_moe.serving.guard import Limits
from serving.live import KEY, NAME, Live, live_server, tiny_checkpoint
from topics import NAMES

HEADERS = {"authorization": f"Bearer {KEY}"}
LOGITS_NEAR, SCORES_NEAR = 5e-3, 1e-4
"""An answer may part from the one alone where the two best logits, or the last chosen and the first dropped score of
the routing, are as near as this."""
PROMPTS = tuple("".join(random.Random(number).choices("abcdefghij", k=number % 40 + 2)) for number in range(64))
BAD: tuple[dict[str, Any], ...] = ({"model": "gpt-4"}, {"max_tokens": 5000}, {"temperature": -1}, {"messages": []})


@dataclass
class Seen:
    """What happened.

    Attributes:
        answers: model and prompt → the bytes of whole greedy answers.
        statuses: how often each status came.
        left: how many clients left in the middle.
        changes: how many changes there were.
    """

    answers: dict[tuple[str, str], set[bytes]] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0
    changes: int = 0
    tokens: int = 0


async def streaming(live: Live, number: int, until: float, seen: Seen) -> None:
    """One client, again and again."""
    drawn = random.Random(number)
    async with httpx.AsyncClient(headers=HEADERS, timeout=60) as client:
        while time.monotonic() < until:
            expert = drawn.choice([None, None, "sql", "law", "base", "extra"])
            model = NAME if expert is None else f"{NAME}:{expert}"
            prompt = drawn.choice(PROMPTS)
            asked = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
            asked |= {"max_tokens": drawn.randint(2, 30), "stream": True, "routing": True}
            bad = drawn.random() < 0.1
            if bad:
                asked |= drawn.choice(BAD)
            patience = drawn.randint(1, 8) if drawn.random() < 0.15 else None
            async with client.stream("POST", f"{live.url}/v1/chat/completions", json=asked) as answer:
                seen.statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    wrong = json.loads(await answer.aread())["error"]
                    assert bad or (answer.status_code, expert) == (404, "extra") or is_leaving(wrong), wrong
                    continue
                assert not bad
                found, ended = b"", False
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line:
                        for choice in json.loads(line.removeprefix("data: "))["choices"]:
                            tokens = choice.get("routing", [])
                            seen.tokens += len(tokens)
                            found += b"".join(bytes(one["bytes"]) for one in tokens)
                    if patience is not None and (patience := patience - 1) == 0:
                        seen.left += 1
                        break
            if ended:
                seen.answers.setdefault((model, prompt), set()).add(found)


def is_leaving(error: dict[str, Any]) -> bool:
    """A request to an expert that is being removed at this moment."""
    return "is being removed" in error["message"]


async def changing(live: Live, every: float, until: float, seen: Seen) -> None:
    """Add an expert, take it away, and so on."""
    there = False
    async with httpx.AsyncClient(headers=HEADERS, timeout=120) as client:
        while time.monotonic() < until or there:
            if there:
                answer = await client.delete(f"{live.url}/v1/experts/extra")
            else:
                answer = await client.post(f"{live.url}/v1/experts", json={"name": "extra", "adapter": "spider"})
            assert answer.status_code == 200, answer.text
            there, seen.changes = not there, seen.changes + 1
            await asyncio.sleep(min(every, max(until - time.monotonic(), 0)))


async def soak(live: Live, clients: int, seconds: float, every: float) -> Seen:
    """All of them."""
    until, seen = time.monotonic() + seconds, Seen()
    await asyncio.gather(*(streaming(live, n, until, seen) for n in range(clients)), changing(live, every, until, seen))
    return seen


def exceptions(live: Live, seen: Seen) -> tuple[int, int]:
    """How many answers there were, and how many are not those of the mixture alone, each at a near tie."""
    model, tokenizer = DyLoraMoE.from_pretrained(str(live.folder)), live.service.session.tokenizer
    bytes_of, parted, count = live.service.engine.token_bytes, 0, 0
    for (name, prompt), answers in seen.answers.items():
        expert = None if name == NAME else name.partition(":")[2]
        inputs = tokenizer(prompt, return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        expected = model.generate(
            **inputs,
            experts="sql" if expert == "extra" else expert,  # a copy of it
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids = expected.sequences[0, start:].tolist()
        for found in answers:
            count += 1
            pieces = [bytes_of(id) for id in ids]
            if b"".join(pieces).startswith(found):
                continue
            at = next(i for i in range(len(ids)) if not found.startswith(b"".join(pieces[: i + 1])))
            best = expected.logits[at][0].topk(2).values
            near = float(best[0] - best[1]) < LOGITS_NEAR
            if not near and expert is None:
                with torch.no_grad():
                    scores = model(expected.sequences[:, : start + at]).router_logits[0].sort(descending=True).values
                kept = model.moe_config.top_k
                near = kept is not None and float((scores[:, kept - 1] - scores[:, kept]).min()) < SCORES_NEAR
            assert near, (name, prompt, found, b"".join(pieces))
            parted += 1
    return count, parted


@pytest.mark.parametrize(
    ("clients", "seconds", "every"),
    [(12, 3.0, 0.7), pytest.param(64, 60.0, 5.0, marks=pytest.mark.slow)],
)
def test_many_clients(tmp_path: Path, record_property, clients: int, seconds: float, every: float):
    folder = tiny_checkpoint(tmp_path, taught=True, granularity="token", top_k=2)
    DyLoraMoE.from_pretrained(str(folder)).export_expert("sql", tmp_path / "adapters" / "spider")
    with live_server(folder, Limits(KEY), changes=True, adapters=tmp_path / "adapters", slots=8) as live:
        asyncio.run(soak(live, clients, min(seconds, 5), every))  # what is allocated once
        gc.collect()
        before = psutil.Process().memory_info().rss
        seen = asyncio.run(soak(live, clients, seconds, every))
        gc.collect()
        grown = (psutil.Process().memory_info().rss - before) / 2**20
        worker = live.service.worker
        deadline = time.monotonic() + 10
        while worker.engine.live or worker.engine.waiting or worker.open_answers:
            assert time.monotonic() < deadline, "a slot is leaked"
            time.sleep(0.01)
        count, parted = exceptions(live, seen)
        told = f"{count} answers, {parted} parted at a near tie; {seen.tokens} tokens, statuses {dict(seen.statuses)}, "
        told += f"{seen.left} left, {seen.changes} changes, memory grown by {grown:.1f} MiB"
        record_property("soak", told)
    assert set(seen.statuses) <= {200, 400, 404}, told
    assert seen.statuses[200] > clients, told
    assert seen.left, told
    assert seen.changes >= 2, told
    assert grown < 48, told
    assert live.service.model.expert_names == list(NAMES)
    shutil.rmtree(folder)
