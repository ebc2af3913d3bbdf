"""Tiny bases of many families, without code for any of them: routed and forced answers equal the library's."""

from pathlib import Path

import pytest

from comparison import reference
from test_routed import mixed

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "opt", "gpt2", "falcon", "gpt_neox")


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, references: Path, tmp_path: Path) -> None:
    case = f"family_{family}"
    folder, answers = reference(case, references)
    mixed(folder, answers, case, tmp_path)
