"""What a training step keeps for its backward pass: the benchmark's own count, on a small shape."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch


def load_benchmark():
    file = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_eight_experts_keep_no_more_than_one_adapter_of_eight_times_the_rank():
    memory = load_benchmark()
    sizes = {"experts": 8, "rank": 8, "layers": 3, "width": 192, "batch": 2, "length": 64, "vocabulary": 512}
    runs = memory.variants(argparse.Namespace(**sizes))
    kept = {name: memory.saved_bytes(model, step) for name, (model, step) in runs.items()}
    wide, ours, loop = kept["PEFT, one adapter r=64"], kept["mixture, E=8 r=8"], kept["weighted loop, E=8 r=8"]
    assert ours <= 1.1 * wide
    assert loop > 2 * wide  # the count does see what the loop keeps


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    memory = load_benchmark()
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4)
    assert memory.saved_bytes(layer, lambda: layer(x)) == x.nbytes
    assert memory.saved_bytes(layer, lambda: layer(x) + layer(x)) == x.nbytes
