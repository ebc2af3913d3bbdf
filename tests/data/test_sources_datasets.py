"""Datasets as a source of examples: a local folder is read, and whatever keeps one out of reach is a `DataError`."""

from __future__ import annotations

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled
from pyarrow import parquet

from dylora_moe.data.examples import DataError, Example
from dylora_moe.data.section import DataRecipe
from dylora_moe.data.sources import load_examples


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset as it lies on the hub: Parquet files named by split; the cache goes to a temporary folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    splits = {
        "train": {"q": ["p", "q"], "a": ["c", "d"], "kind": ["x", "y"]},
        "test": {"q": ["r"], "a": ["e"], "kind": ["x"]},
    }
    for split, columns in splits.items():
        parquet.write_table(pyarrow.table(columns), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    return str(tmp_path / "data")


def test_a_dataset_folder_is_read_by_split(folder):
    options = {"path": folder, "columns": {"prompt": "q", "completion": "a"}}
    data = DataRecipe(**options, test_split="test", filter={"kind": "x"})
    assert load_examples("law", data, "train") == [Example("p", "c", "law")]
    assert load_examples("law", data, "test") == [Example("r", "e", "law")]
    assert load_examples("law", DataRecipe(**options, split="train[1:]"), "train") == [Example("q", "d", "law")]


def test_rows_and_splits_that_a_dataset_does_not_have_are_named(folder):
    with pytest.raises(DataError, match=r"dataset .*data \(train\), row 1: no 'messages', .* Its columns: q, a, kind"):
        load_examples("law", DataRecipe(path=folder), "train")
    with pytest.raises(DataError, match=r'dataset .*data \(dev\): Unknown split "dev"\. .*Check `path`, `name` and'):
        load_examples("law", DataRecipe(path=folder, split="dev"), "train")
    with pytest.raises(DataError, match=r"'gsm' not found.*Check `path`, `name`"):
        load_examples("law", DataRecipe(path=folder, name="gsm"), "train")


def interrupted(*_, **__):
    try:
        raise OSError(28, "No space left on device")
    except OSError as cause:
        raise DatasetGenerationError("An error occurred while generating the dataset") from cause


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"),
            r"could not be loaded whole \(ConnectionError: Couldn't reach .*nothing of it is used\. Check the network",
        ),
        (
            DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."),
            r"is a gated dataset on the Hub\. Check `path`, .* log in with `hf auth login`",
        ),
        (OfflineModeIsEnabled("Offline mode is enabled."), r"not in the cache, and offline mode is on\. Unset HF_HUB"),
        (ConnectionResetError(104, "Connection reset by peer"), r"ConnectionResetError: .*Connection reset by peer\)"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), r"RuntimeError: Dataset scripts"),
        (interrupted, r"could not be loaded whole \(OSError: .*No space left on device\)"),
    ],
)
def test_datasets_that_cannot_be_had_are_data_errors(monkeypatch, raised, message):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        raise raised if isinstance(raised, Exception) else raised()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    data = DataRecipe(path="a/b", name="main", split="validation", revision="v1")
    with pytest.raises(DataError, match=r"^dataset a/b \(validation\): .*" + message):
        load_examples("law", data, "train")
    assert asked == [(("a/b", "main"), {"split": "validation", "revision": "v1"})]


def test_offline_mode_is_named_as_datasets_reports_it(monkeypatch):
    """Not a stand-in: `load_dataset` itself, which wraps the error once more."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="not in the cache, and offline mode is on"):
        load_examples("law", DataRecipe(path="nobody/nothing"), "train")


def test_a_folder_that_save_to_disk_wrote_is_read(tmp_path):
    train = Dataset.from_dict({"prompt": ["p", "q"], "completion": ["c", "d"]})
    test = Dataset.from_dict({"prompt": ["r"], "completion": ["e"]})
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    data = DataRecipe(path=str(tmp_path / "both"), test_split="test")
    assert load_examples("a", data, "train") == [Example("p", "c", "a"), Example("q", "d", "a")]
    assert load_examples("a", data, "test") == [Example("r", "e", "a")]
    with pytest.raises(DataError, match=r"both \(tests\): no split 'tests'\. Did you mean 'test'\? It has train, test"):
        load_examples("a", DataRecipe(path=str(tmp_path / "both"), split="tests"), "train")
    test.save_to_disk(tmp_path / "one")
    assert load_examples("a", DataRecipe(path=str(tmp_path / "one")), "train") == [Example("r", "e", "a")]
    with pytest.raises(DataError, match=r"one \(dev\): the folder holds one data set without splits"):
        load_examples("a", DataRecipe(path=str(tmp_path / "one"), test_split="dev"), "test")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"one \(train\): cannot be read"):
        load_examples("a", DataRecipe(path=str(tmp_path / "one")), "train")
