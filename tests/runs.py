"""Small runs of recipes on a tiny base, and what to compare of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from dylora_moe.training.recipe.recipe import apply_overrides, parse_recipe
from dylora_moe.training.run.job import Job
from dylora_moe.training.trainer.checkpoints import EXEMPT_FROM_RESUME

QUIET = Console(quiet=True)
SPECIALISTS = {"method": "specialists", "max_steps": 4, "router": "trained", "router_steps": 4}
STAGED = {"method": "staged", "expert_steps": 4, "router_steps": 4, "joint_steps": 2}
STEPS = 3
SMALLER = {
    **dict.fromkeys(("max_steps", "expert_steps", "router_steps", "joint_steps"), STEPS),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), 1),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "validation"), 2),
    "gradient_accumulation_steps": 2,
    "max_length": 256,  # what the base has
    "warmup_steps": 0,  # a step at the rate 0 changes nothing
}


def small_recipe(base: str, output: Path, **train: Any) -> dict[str, Any]:
    """A recipe of two generated skills as plain values; keyword arguments are keys of `train`."""
    return {
        "base": {"model": base},
        "experts": {
            "date": {"data": {"skill": "date", "train": 16, "test": 2}},
            "cart": {"data": {"skill": "cart", "train": 16, "test": 2}},
        },
        "mixture": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.2},
        "train": {
            "per_device_train_batch_size": 2,
            "logging_steps": 3,  # not a multiple of the saves
            "save_steps": 2,
            "save_total_limit": 10,
            "learning_rate": 1e-2,
            "router_learning_rate": 3e-3,
            "domain_coefficient": 0.1,
            **train,
        },
        "eval": {"metric": "loss", "batch_size": 2},
        "output": str(output),
    }


def small(content: dict[str, Any], base: str, folder: Path) -> dict[str, Any]:
    """The content of a recipe with little to do; a file in `folder` takes the place of each data set of the hub."""
    if "start" not in content:
        content["base"]["model"] = base
    for name, expert in [*content["experts"].items()]:
        if "path" in expert.get("data", {}):  # a file in the place of the data set, as a user without internet gives it
            files = [f"experts.{name}.data.{key}={rows(folder / f'{name}-{key}.jsonl')}" for key in ("train", "test")]
            content = apply_overrides(content, files)
    for expert in content["experts"].values():
        data = expert.get("data", {})
        if "skill" in data:
            data |= {"train": 12, "test": 2}
    content["train"] |= {key: value for key, value in SMALLER.items() if key in content["train"]}
    content["eval"] |= {"samples": 2, "max_new_tokens": 4, "baseline": False}
    return content


def rows(file: Path) -> str:
    """Twelve rows in a file."""
    lines = [{"prompt": f"{file.stem} {i}?", "completion": f"answer {i}"} for i in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def run(content: dict[str, Any], **options: Any) -> Job:
    """Run a recipe in this process."""
    job = Job(parse_recipe(content), QUIET)
    job.run(**options)
    return job


def write(content: dict[str, Any], file: Path) -> Path:
    """Write a recipe as a file; the experts keep their order."""
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Everything that a run trained."""
    found = {}
    for name in ("date/adapter_model", "cart/adapter_model", "router"):
        file = Path(folder) / f"{name}.safetensors"
        found |= {f"{name}/{key}": value for key, value in load_file(file).items()}
    return found


def history(folder: str | Path) -> list[dict[str, Any]]:
    """What a run logged, without the fields that are exempt."""
    rows = json.loads((Path(folder) / "history.json").read_text())
    return [{k: v for k, v in row.items() if k not in EXEMPT_FROM_RESUME} for row in rows]


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """Two runs ended with the same tensors and the same log, to the bit."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    assert history(one) == history(other)
