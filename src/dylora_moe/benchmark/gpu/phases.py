"""The phases, each in a process of its own, and what is told of them."""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

import peft
import torch
import transformers

from dylora_moe.benchmark.timing import NO_GPU
from dylora_moe.mixing import kernels

from .kernels import call_times, checks
from .models import decoding, prefill, training
from .setting import ACTIVE, EXPERTS, MANY, Setting


class Phase(NamedTuple):
    """One part of the measurement.

    Attributes:
        seconds: that it may take, the start of its process included.
        measure: is given the setting and the `time.monotonic()` at which timing should end; returns what is written.
    """

    seconds: int
    measure: Callable[[Setting, float], dict[str, Any]]


PHASES = {
    "checks": Phase(60, checks),
    "kernels": Phase(90, call_times),
    "prefill": Phase(110, prefill),
    "training": Phase(130, training),
    "decoding": Phase(150, decoding),
}


def run_phase(name: str, setting: Setting) -> dict[str, Any]:
    """A phase in this process."""
    phase = PHASES[name]
    return phase.measure(setting, time.monotonic() + 0.6 * phase.seconds)  # the rest is for loading and building


def run_apart(command: Sequence[str], phases: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every phase in a process of its own: what it found, or its `error`, and the `seconds` it took.

    Args:
        command: that runs one phase when `--phase NAME --out FILE` is appended, and writes it into the file.
        phases: names.
    """
    for name in phases:
        started, limit = time.monotonic(), PHASES[name].seconds
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "phase.json"
            asked = [*command, "--phase", name, "--out", str(out)]
            try:
                done = subprocess.run(asked, timeout=limit, stderr=subprocess.PIPE, text=True)
                error = None if done.returncode == 0 else done.stderr[-2000:]
            except subprocess.TimeoutExpired:
                error = f"took more than {limit} s"
            found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"error": error}
        found["seconds"] = round(time.monotonic() - started, 1)
        yield name, found


def summary(name: str, result: Mapping[str, Any]) -> list[str]:
    """A phase in a few lines of text."""
    told = [f"{k}: {result[k]}" for k in ("error", "skipped", "passed", "failed") if result.get(k) not in (None, {})]
    lines = [" ".join([f"{name} ({result['seconds']} s)", *told])]
    for row in result.get("rows", []):
        if "ratio" not in row:
            continue
        label = row.get("variant") or f"{row['kernel']}, {row['layer']}, {row['tokens']} tokens: {row['way']}"
        label += " (no CUDA graph)" if row.get("without_graph", NO_GPU) != NO_GPU else ""
        interval = f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        lines.append(f"  {label:<60}{row['ms']:10.3f} ms{row['ratio']:8.3f}  {interval}")
    return lines


def failed(result: Mapping[str, Any]) -> bool:
    """Whether something of a phase went wrong."""
    return "error" in result or bool(result.get("failed")) or result.get("passed") is False


def describe(setting: Setting) -> dict[str, Any]:
    """Where, with what and at which sizes this is measured."""
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if setting.device.type == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__,
        "peft": peft.__version__, "python": platform.python_version(),
        "dtype": str(setting.dtype).removeprefix("torch."), "kernels_available": setting.has_kernels,
    }  # fmt: skip
    if kernels.INSTALLED:
        import triton

        found["triton"] = triton.__version__
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if which("git") else ""
    told = {"commit": commit or None, "sizes": setting.sizes, "experts": EXPERTS, "top_k": f"{ACTIVE} of {MANY}"}
    return {**found, **told}
