"""Members of a group, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dylora_moe.mixing.member import LayerExperts, Member

TESTS = Path(__file__).parents[1]


@pytest.fixture
def python():
    """`python(*arguments, **environment)` → what it prints, in a process of its own.

    Triton decides at import whether it interprets.
    """

    def run(*arguments: str, **environment: str) -> str:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
        paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
            cwd=TESTS.parent,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def member():
    """`member(experts, rank, width)` → a layer of float32 whose A, and whose B, lie side by side in memory."""

    def build(experts: int = 8, rank: int = 16, width: int = 64) -> Member:
        A, B = torch.randn(experts, rank, width), torch.randn(experts, width, rank)
        own = LayerExperts(tuple(range(experts)), (rank,) * experts, (2.0,) * experts)
        return Member(own, torch.randn(width, width), None, list(A), list(B))

    return build
