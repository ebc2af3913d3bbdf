"""The phases of the kernels by themselves; `mixing/test_kernels.py` tests the kernels."""

from __future__ import annotations

import pytest
import torch

from dylora_moe.benchmark.gpu import kernels
from dylora_moe.benchmark.gpu.setting import TINY, Setting

HERE = Setting(TINY, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("phase", [kernels.checks, kernels.call_times])
def test_without_kernels_they_are_skipped(phase):
    assert phase(HERE, 0.0) == {"skipped": kernels.NO_KERNELS}


@pytest.mark.parametrize("name", kernels.CALLS)
def test_torch_s_way_to_the_same_numbers_is_the_definition(name):
    tensors = {key: tensor.double() for key, tensor in kernels.random_layer(3, 8, 6, HERE).items()}
    expected = {
        "shrink": lambda t: t["x"] @ t["A"].T * t["gates"],
        "expand": lambda t: t["y"] + t["Hw"] @ t["B"].T,
    }[name](tensors)
    torch.testing.assert_close(kernels.CALLS[name][1](tensors), expected)


def test_every_kernel_meets_every_layer_with_one_token_and_with_many():
    found = list(kernels.cases(TINY))
    assert len(set(found)) == len(found) == len(kernels.CALLS) * len(kernels.layer_shapes(TINY)) * 2
