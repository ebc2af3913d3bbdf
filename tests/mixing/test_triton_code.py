"""The kernels' code, translated for real GPUs; `translate_kernels.py` does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dylora_moe.mixing import kernels

TRANSLATE = Path(__file__).parent / "translate_kernels.py"


@pytest.mark.slow
@pytest.mark.skipif(not kernels.INSTALLED, reason="triton is not installed (pip install triton)")
def test_kernels_translate_for_gpus_within_their_shared_memory(python, tmp_path):
    """Triton's compiler and ptxas need no GPU: every tile of the table, for an A100 and an H100."""
    assert "translated" in python(str(TRANSLATE), TRITON_CACHE_DIR=str(tmp_path))
