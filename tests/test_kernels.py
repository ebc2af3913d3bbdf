"""The Triton kernels on a machine without a GPU: interpreted, translated for real GPUs, and absent."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dylora_moe.mixing import kernels, launch

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)


def run(*command: str, **environment: str) -> str:
    """Run Python in a process of its own, since triton decides at import whether it interprets."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    done = subprocess.run(
        [sys.executable, *command],
        env={**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_kernels_equal_the_loop_through_the_interpreter():
    out = run(
        *("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(TESTS / "interpreted_kernels.py")),
        TRITON_INTERPRET="1",
    )
    assert "passed" in out
    assert "skipped" not in out


@needs_triton
def test_kernels_translate_for_gpus_within_their_shared_memory(tmp_path):
    """Triton's compiler and ptxas need no GPU: every tile of the table, for an A100 and an H100."""
    assert "translated" in run(str(TESTS / "translate_kernels.py"), TRITON_CACHE_DIR=str(tmp_path))


def test_without_a_gpu_they_are_not_available():
    assert not kernels.available(torch.zeros(1))


def test_without_triton_the_package_works_and_they_are_not_available():
    run(
        "-c",
        "import sys; sys.modules['triton'] = None; import torch; from dylora_moe.mixing import kernels; "
        "assert not kernels.available(torch.zeros(1))",
        TRITON_INTERPRET="1",
    )


@pytest.mark.parametrize("T", [1, 16, 17, 256, 257, 2048])
@pytest.mark.parametrize(("D", "R"), [(1, 1), (4096, 128), (14336, 1024), (300, 20)])
@pytest.mark.parametrize("bits", [16, 32])
def test_every_column_is_summed_once(T, D, R, bits):
    blocks = launch.shrink_blocks(T, D, R, bits)
    chunk = launch._chunk(D, blocks)
    assert chunk % blocks.inner == 0
    assert chunk * blocks.split >= D
    assert min(blocks.tokens, blocks.columns, blocks.inner) >= 16  # what tl.dot takes
    tiles = -(-T // blocks.tokens) * -(-R // blocks.columns)
    assert blocks.split == 1 or tiles * blocks.split <= launch._PROGRAMS
