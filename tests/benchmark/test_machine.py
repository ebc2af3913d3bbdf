"""The machine in words."""

from __future__ import annotations

import torch

from dylora_moe.benchmark import machine
from dylora_moe.benchmark.machine import cpu_model, describe, slug


def test_machine_names_become_file_names():
    assert slug("AMD EPYC 9V74, 2 cores") == "amd-epyc-9v74-2-cores"


def test_the_processor_is_named_without_what_every_processor_has(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\n")
    assert cpu_model().split() == ["Intel", "Xeon"]
    (tmp_path / "cpuinfo").unlink()
    assert cpu_model()


def test_versions_and_threads_say_how_fast_it_is():
    found = describe("cpu")
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"].keys() == set(machine.PACKAGES)
    assert "cores" in found["name"]
