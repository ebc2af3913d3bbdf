"""Phases in processes of their own, and `benchmarks/gpu.sh` on small shapes, on whatever device there is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dylora_moe.benchmark.gpu import phases
from dylora_moe.benchmark.gpu.phases import PHASES, Phase, describe, failed, run_apart, summary
from dylora_moe.benchmark.gpu.setting import Setting

ROOT = Path(__file__).parents[3]
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


def fake(body: str) -> list[str]:
    """A command that runs `body` with NAME and OUT of the phase."""
    read = "import sys, pathlib; NAME, OUT = sys.argv[2], pathlib.Path(sys.argv[4])"
    return [sys.executable, "-c", f"{read}; {body}"]


def test_a_phase_that_fails_costs_only_itself():
    body = "OUT.write_text('{\"rows\": []}') if NAME == 'prefill' else sys.exit('no memory')"
    found = dict(run_apart(fake(body), ["checks", "prefill"]))
    assert "no memory" in found["checks"]["error"]
    assert found["prefill"]["rows"] == []
    assert all(result["seconds"] >= 0 for result in found.values())
    assert [failed(result) for result in found.values()] == [True, False]


def test_a_phase_that_hangs_is_ended(monkeypatch):
    monkeypatch.setitem(PHASES, "checks", Phase(1, phases.checks))
    assert dict(run_apart(fake("import time; time.sleep(60)"), ["checks"]))["checks"]["error"] == "took more than 1 s"


def test_all_phases_fit_into_ten_minutes():
    assert sum(phase.seconds for phase in PHASES.values()) < 600


def test_summary_has_a_line_per_row():
    row = {"ms": 1.5, "ratio": 1.25, "ratio_low": 1.0, "ratio_high": 1.5}
    rows = [{"variant": "base", **row}, {"variant": "ours", "without_graph": "RuntimeError: no", **row}, {"error": 1}]
    head, base, ours = summary("decoding", {"seconds": 2.0, "failed": {}, "rows": rows})
    assert head == "decoding (2.0 s)"
    assert base.split() == ["base", "1.500", "ms", "1.250", "[1.000,", "1.500]"]
    assert "ours (no CUDA graph)" in ours
    (skipped,) = summary("checks", {"seconds": 1.0, "skipped": "no GPU"})
    assert skipped == "checks (1.0 s) skipped: no GPU"


@pytest.mark.parametrize(
    ("result", "expected"),
    [({"failed": {}}, False), ({"failed": {"ours": "x"}}, True), ({"passed": False}, True), ({"passed": True}, False)],
)
def test_what_counts_as_failed(result, expected):
    assert failed(result) is expected


def test_description_can_be_written():
    told = json.loads(json.dumps(describe(Setting.here(tiny=True))))
    assert told["experts"] == 8
    assert told["sizes"]["layers"] == 2
