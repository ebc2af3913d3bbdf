"""Rows, batches and steps, counted before a training."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig

from dylora_moe.training.trainer.steps import batches_of, check_steps, rows_of


def arguments(folder: Any, **options: Any) -> SFTConfig:
    return SFTConfig(output_dir=str(folder), bf16=False, report_to="none", **options)


@pytest.mark.parametrize(
    ("rows", "drop_last", "world_size", "batches"),
    [(8, True, 1, 2), (9, True, 1, 2), (9, False, 1, 3), (3, True, 1, 0), (3, False, 1, 1), (7, True, 2, 0)],
)
def test_batches(rows, drop_last, world_size, batches, tmp_path):
    settings = arguments(tmp_path, per_device_train_batch_size=4, dataloader_drop_last=drop_last)
    assert batches_of(rows, settings, world_size) == batches
    if batches:
        check_steps(rows, settings, world_size)
        return
    with pytest.raises(ValueError, match=f"stage x would make no optimizer step: {rows} rows do not fill one batch"):
        check_steps(rows, settings, world_size, "stage x")


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"num_train_epochs": 0}])
def test_no_steps_asked_for(options, tmp_path):
    with pytest.raises(ValueError, match="would make no optimizer step: max_steps="):
        check_steps(8, arguments(tmp_path, **options), 1)
    check_steps(8, arguments(tmp_path, num_train_epochs=0, max_steps=1), 1)


def test_packed_rows_are_those_of_each_domain(tmp_path):
    data = Dataset.from_list([{"input_ids": [1] * 5, "domain": "ab"[i % 2]} for i in range(6)])
    assert rows_of(data, arguments(tmp_path, max_length=10, packing=True)) == 4
    assert rows_of(data, arguments(tmp_path, max_length=10)) == 6
