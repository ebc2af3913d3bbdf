"""A small trainer with two experts, their rows in turn, and a set to evaluate on."""

from __future__ import annotations

import torch
from datasets import Dataset
from trl import SFTConfig

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.training.trainer.trainer import MoETrainer
from tinybase import tiny_base, tiny_tokenizer

ROWS = [{"prompt": f"ask {i}", "completion": " yes" * (1 + i % 5), "domain": "ab"[i % 2]} for i in range(11)]


def run(folder, callbacks=(), rows=ROWS, trainer=None, **options) -> MoETrainer:
    torch.manual_seed(1)
    config = MoELoraConfig(expert_names=["a", "b"], r=4, target_modules="all-linear", init_lora_weights=False, top_k=1)
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "activation_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        **options,
    }
    return MoETrainer(
        DyLoraMoE.from_base(tiny_base(), config),
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        **(trainer or {}),
    )
