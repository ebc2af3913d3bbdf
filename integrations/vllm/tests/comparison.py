"""What vLLM answers against what the library answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARY = HERE.parents[2]
GAP = 1e-2
"""Logits this near may change places between two ways of adding up."""
TIE = 1e-3
"""Likewise the scores of the last output that is kept and of the first that is not."""
WEIGHTS = 1e-4
"""Weights nearer than that are equal: float32 sums in another order, through the layers below k."""


class EngineFailed(AssertionError):
    """An engine that ended with an error; its text is what it wrote."""


def reference(case: str, out: Path) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder of a case and the library's answers, made by the library's own Python where they are not there yet."""
    file = out / f"{case}.json"
    if not file.is_file():
        python = os.environ.get("DYLORA_PYTHON", str(LIBRARY / ".venv/bin/python"))
        source = os.environ.get("DYLORA_SOURCE", str(LIBRARY / "src"))
        environment = os.environ | {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([python, HERE / "reference.py", out, case], check=True, env=environment)
    return out / case, json.loads(file.read_text())["answers"]


def run(
    folder: Path, rounds: list[dict[str, Any]], new: int, scratch: Path, **engine: Any
) -> list[list[dict[str, Any]]]:
    """What an engine answers in each round.

    Raises:
        EngineFailed: it ended with an error.
    """
    environment = os.environ | engine.pop("environment", {})
    preempted = engine.pop("preempted", False)
    scratch.mkdir(parents=True, exist_ok=True)
    job, answers = scratch / "job.json", scratch / "answers.json"
    parts = {"folder": str(folder), "engine": engine, "rounds": rounds, "new": new, "preempted": preempted}
    job.write_text(json.dumps(parts))
    done = subprocess.run(
        [sys.executable, HERE / "engine.py", job, answers], env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise EngineFailed(done.stdout[-4000:] + done.stderr[-8000:])
    return json.loads(answers.read_text())


def requests(rows: list[dict[str, Any]], selector: str | None = None) -> list[dict[str, Any]]:
    """The prompts of some rows as requests."""
    return [{"prompt": row["prompt"], "selector": selector} for row in rows]


def check(what: str, answers: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Raise `AssertionError` unless all answers are equal, near ties excepted; print how many were."""
    equal, near, wrong = 0, [], []
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        if answer["tokens"] == row["tokens"]:
            equal += 1
            continue
        at = next(i for i, pair in enumerate(zip(answer["tokens"], row["tokens"], strict=True)) if len(set(pair)) > 1)
        found = (number, at, round(row["gap"][at], 5), round(row["tie"][at], 5))
        (near if row["gap"][at] < GAP or row["tie"][at] < TIE else wrong).append(found)
    cached = sum(answer["cached"] for answer in answers)
    line = f"{what}: {equal} of {len(rows)} equal, {len(near)} near ties {near}, {len(wrong)} wrong {wrong[:6]}"
    print(f"\nCOMPARED {line}; {cached} prompt tokens from the prefix cache", flush=True)
    assert not wrong, line


def check_routing(what: str, answers: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Raise `AssertionError` unless the recorded weights are the library's, near ties excepted; print how many were.

    Every token of an answer must be on record, up to the first that differs. Of the prompts, what was computed.
    """
    equal, prompt, near, wrong, largest = 0, 0, 0, [], 0.0
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        first, found = len(row["prompt"]) - 1, answer["routing"]["weights"]
        same = [ours == theirs for ours, theirs in zip(answer["tokens"], row["tokens"], strict=True)]
        stop = first + (same.index(False) if False in same else len(same))
        assert answer["routing"]["prompt"] == len(row["prompt"])
        assert None not in found[first:stop], f"{what}: answer {number} has gaps"
        for position, expected in enumerate(row["routing"][:stop]):
            if found[position] is None:
                continue
            off = max(abs(a - b) for a, b in zip(found[position], expected, strict=True))
            if off < WEIGHTS:
                equal, prompt, largest = equal + (position >= first), prompt + (position < first), max(largest, off)
            elif row["tie"][max(position - first, 0)] < TIE:
                near += 1
            else:
                wrong.append((number, position - first, off))
    counts = f"{equal} tokens written and {prompt} of prompts equal (to {largest:.1e}), {near} near ties"
    line = f"{what}: weights of {counts}, {len(wrong)} wrong {wrong[:6]}"
    print(f"\nCOMPARED {line}", flush=True)
    assert not wrong, line
