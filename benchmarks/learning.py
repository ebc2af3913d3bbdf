"""How long learning a skill of 200 rows takes beside a plain LoRA of the same rank on the same rows and layers.

    python benchmarks/learning.py [--rounds 3] [--steps 25] [--base embedded]

Both in turn in one process: looking at the rows, training and teaching the router, against TRL's SFTTrainer on a stock
PEFT model, as many steps of 8 rows each: 25 go once through the rows, `dylora-moe learn` by itself takes 75. What
novelty reads once for a base is read before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.base.embedded import EMBEDDED, resolve_base
from dylora_moe.data.examples import Example, to_dataset
from dylora_moe.data.generated import generate
from dylora_moe.lifelong.learn import Training, learn
from dylora_moe.training.run.arguments import DEFAULT_ARGUMENTS
from dylora_moe.training.run.build import single_lora_config

OLD, NEW, ROWS, BATCH = ("json", "sql", "date"), "cart", 200, 8


def examples(skill: str, count: int, seed: int = 0) -> list[Example]:
    """Rows of a generated skill."""
    return [Example(row["prompt"], row["completion"], skill) for row in generate(skill, "train", count, seed)]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--base", default=EMBEDDED)
    asked = parser.parse_args()
    source = resolve_base(asked.base)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    config = MoELoraConfig(expert_names=list(OLD), router_type="closed_form", r=8, target_modules="all-linear")
    mixture = DyLoraMoE.from_base(AutoModelForCausalLM.from_pretrained(source), config).eval()
    mixture.chat = False
    mixture.teach_many({name: examples(name, 40) for name in OLD}, tokenizer)
    mixture.novelty(examples(NEW, 1), tokenizer=tokenizer)
    single = single_lora_config(mixture)
    single.r, single.lora_alpha = 8, 16
    plain: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(source), single)
    training, ratios = Training(steps=asked.steps, batch_size=BATCH), []
    for number in range(asked.rounds):
        rows = examples(NEW, ROWS, seed=number + 1)  # others each time: what was read last is kept
        started = time.perf_counter()
        learn(mixture, rows, NEW, tokenizer, everything=True, training=training)
        ours = time.perf_counter() - started
        mixture.forget(NEW)
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                **DEFAULT_ARGUMENTS,
                "max_steps": asked.steps,
                "per_device_train_batch_size": BATCH,
                "save_strategy": "no",
            }
            settings["use_cpu"] = not torch.accelerator.is_available()
            started = time.perf_counter()
            data = to_dataset(rows, tokenizer).remove_columns("domain")
            SFTTrainer(plain, SFTConfig(folder, **settings), train_dataset=data, processing_class=tokenizer).train()
            theirs = time.perf_counter() - started
        ratios.append(ours / theirs)
        print(
            f"round {number + 1}: learning {ours:.1f} s, plain LoRA {theirs:.1f} s, ratio {ratios[-1]:.2f}", flush=True
        )
    print(f"median ratio {median(ratios):.2f}")


if __name__ == "__main__":
    main()
