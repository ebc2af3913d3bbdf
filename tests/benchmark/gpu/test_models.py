"""Layer stacks on small shapes on a CPU: what each phase times and tells."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dylora_moe.benchmark.gpu import models
from dylora_moe.benchmark.gpu.setting import TINY, Setting
from dylora_moe.mixing import kernels

HERE = Setting({**TINY, "rounds": 1}, torch.device("cpu"), torch.float32)


def test_one_that_fails_is_left_out_with_the_reason_unless_it_is_the_base(monkeypatch):
    built = {name: (torch.nn.Linear(1, 1), nullcontext) for name in ("base", "broken")}
    monkeypatch.setattr(models, "variants", lambda setting: built)

    def prepare(model, fails):
        if model is built[fails][0]:
            raise RuntimeError("out of memory")
        return (lambda: None), {"note": 1}

    found = models.measured(HERE, 0.0, lambda model: prepare(model, "broken"))
    assert [row["variant"] for row in found["rows"]] == ["base"]
    assert found["rows"][0]["note"] == 1
    assert found["failed"] == {"broken": "RuntimeError: out of memory"}
    with pytest.raises(RuntimeError, match="the bare base failed"):
        models.measured(HERE, 0.0, lambda model: prepare(model, "base"))


def test_torch_alone_switches_the_kernels_off_and_on_again(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda x: True)
    with models.torch_alone():
        assert not kernels.available(torch.zeros(1))
    assert kernels.available(torch.zeros(1))


def test_look_counts_what_is_read_back():
    layer, x = torch.nn.Linear(2, 3), torch.ones(4)
    found = models.look(layer, lambda: x.sum().item())
    assert (found["host_reads"], found["kernel_calls"], found["model_bytes"]) == (1, 0, 9 * 4)


def test_decoding_rewinds_before_every_timing():
    """More steps than the cache has room for."""
    found = models.decoding(HERE, 0.0)
    assert not found["failed"]
    rows = {row["variant"]: row for row in found["rows"]}
    assert rows["base"]["ratio"] == 1
    assert all(row["without_graph"] == "no GPU" for row in rows.values())
