"""How many rows, batches and optimizer steps a training has, before it starts."""

from __future__ import annotations

import math
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig, pack_dataset  # pyright: ignore[reportPrivateImportUsage]

from .collator import DOMAIN


def rows_of(dataset: Any, arguments: SFTConfig) -> int:
    """Rows of one epoch: the tokenised examples, packed as the trainer packs them, each domain by itself."""
    if not (arguments.packing and arguments.max_length):
        return len(dataset)
    domains, rows = dataset[DOMAIN], 0
    for name in dict.fromkeys(domains):
        own = [ids for ids, domain in zip(dataset["input_ids"], domains, strict=True) if domain == name]
        rows += len(
            pack_dataset(Dataset.from_dict({"input_ids": own}), arguments.max_length, arguments.packing_strategy)
        )
    return rows


def batches_of(rows: int, arguments: TrainingArguments, world_size: int) -> int:
    """Batches of one epoch in each process."""
    batch = arguments.per_device_train_batch_size * world_size
    return rows // batch if arguments.dataloader_drop_last else math.ceil(rows / batch)


def check_steps(rows: int, arguments: TrainingArguments, world_size: int, what: str = "the training") -> None:
    """Raise `ValueError` where a training would end without one optimizer step."""
    if arguments.max_steps == 0 or (arguments.max_steps < 0 and arguments.num_train_epochs <= 0):
        raise ValueError(
            f"{what} would make no optimizer step: max_steps={arguments.max_steps}, "
            f"num_train_epochs={arguments.num_train_epochs}. Set one of them to more than 0."
        )
    if batches_of(rows, arguments, world_size) == 0:
        raise ValueError(
            f"{what} would make no optimizer step: {rows} rows do not fill one batch of "
            f"{arguments.per_device_train_batch_size} in each of {world_size} processes, and dataloader_drop_last "
            "drops what does not. Set it to false, or lower per_device_train_batch_size."
        )
