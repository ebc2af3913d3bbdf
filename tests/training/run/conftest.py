"""What the tests of a run have in common: a tiny base and a recipe of two skills."""

from __future__ import annotations

import pytest

from runs import small_recipe
from tinybase import save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def content(base, tmp_path):
    """A recipe as plain values; keyword arguments are keys of `train`."""
    return lambda name="run", **train: small_recipe(base, tmp_path / name, **train)
