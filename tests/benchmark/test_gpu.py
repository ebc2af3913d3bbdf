"""`benchmarks/gpu.sh` on small shapes, on whatever device there is: every phase, every variant, one JSON file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIANTS = {
    "base", "base again", "PEFT r=4", "PEFT r=32", "mixture E=8 dense, kernels", "mixture E=8 dense, torch alone",
    "mixture top-2 of 64, kernels", "mixture top-2 of 64, torch alone",
}  # fmt: skip


@pytest.mark.slow
def test_one_command_writes_every_phase(tmp_path):
    out = tmp_path / "gpu.json"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = {**kept, "PYTHON": sys.executable, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--tiny", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    for phase in ("prefill", "training", "decoding"):
        rows = {row["variant"]: row for row in found[phase]["rows"]}
        assert set(rows) == VARIANTS
        assert not found[phase]["failed"]
        assert rows["base"]["ratio"] == 1
        assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows.values())
        assert all(row["rounds"] == found["setting"]["sizes"]["rounds"] for row in rows.values())
        assert all(row["kernel_calls"] == 0 for name, row in rows.items() if not name.endswith(", kernels"))
    if importlib.util.find_spec("triton") is None:
        assert "skipped" in found["checks"]
        return
    assert found["setting"]["kernels_available"]
    assert found["checks"]["passed"]
    assert {row["kernel"] for row in found["kernels"]["rows"]} == {"shrink", "expand"}
