"""The machine in words that say how fast it is, not whose it is."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("dylora-moe", "torch", "transformers", "peft")
CPU_INFO = Path("/proc/cpuinfo")


def describe(device: str) -> dict[str, Any]:
    """Name (processor and cores, or GPU), threads and versions."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_model()}, {cores()} cores"
    return {
        "name": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def cpu_model() -> str:
    """The processor's model, or its architecture where the system does not tell."""
    if CPU_INFO.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return re.sub(r"\((R|TM)\)|\bCPU\b|@.*", "", found[1]).strip()
    return platform.machine() or "unknown processor"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(name: str) -> str:
    """`name` as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
