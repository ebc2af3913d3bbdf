"""The entry point, where there is no vLLM that it was tested with."""

import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import dylora_moe_vllm

PROJECT = Path(__file__).parents[2] / "integrations" / "vllm" / "pyproject.toml"


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.320.0", "1.0.32.0"])
def test_an_untested_version_is_one_line(version: str, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    dylora_moe_vllm.register()
    (record,) = caplog.records
    assert f"this is {version}: mixtures are not served" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_the_distribution_says_what_the_package_says():
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    assert project["version"] == dylora_moe_vllm.__version__
    assert project["entry-points"]["vllm.general_plugins"] == {"dylora_moe": "dylora_moe_vllm:register"}
    assert project["dependencies"] == []
