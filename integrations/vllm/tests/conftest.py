"""The references are made once per session, in a folder that DYLORA_REFERENCES may name to keep them."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = os.environ.get("DYLORA_REFERENCES")
    return Path(folder) if folder else tmp_path_factory.mktemp("references")
