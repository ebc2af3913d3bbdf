"""The Triton kernels on a machine without a GPU: interpreted, and absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dylora_moe.mixing import kernels

INTERPRETED = Path(__file__).parent / "interpreted_kernels.py"


@pytest.mark.slow
@pytest.mark.skipif(not kernels.INSTALLED, reason="triton is not installed (pip install triton)")
def test_kernels_equal_the_loop_through_the_interpreter(python):
    out = python(
        "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(INTERPRETED), TRITON_INTERPRET="1"
    )  # fmt: skip
    assert "passed" in out
    assert "skipped" not in out


def test_without_a_gpu_they_are_not_available():
    assert not kernels.available(torch.zeros(1))


def test_without_triton_the_package_works_and_they_are_not_available(python):
    python(
        "-c",
        "import sys; sys.modules['triton'] = None; import torch; from dylora_moe.mixing import kernels; "
        "assert not kernels.available(torch.zeros(1))",
        TRITON_INTERPRET="1",
    )
