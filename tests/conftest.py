"""Offline, seeded and one thread per worker, unless OMP_NUM_THREADS says more: what every test runs under."""

import os

# Read when huggingface_hub and tokenizers are imported, hence before anything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from rounding import float64_throughout

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the models are tiny; a second one only waits

hypothesis.settings.register_profile("dylora", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dylora")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["DYLORA_MOE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def exact() -> Iterator[None]:
    """Float64 throughout, so that a module of float64 models may compare to `rounding.EXACT`."""
    with float64_throughout():
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared data and adapters, beside the repository or named by DYLORA_SHARED."""
    folder = Path(os.environ.get("DYLORA_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (DYLORA_SHARED names another folder)")
    return folder
