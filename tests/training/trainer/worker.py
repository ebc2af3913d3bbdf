"""One of several training processes: `torchrun worker.py FOLDER CHECK…` writes what each check found into FOLDER.

Started by test_distributed.py, which runs the same checks in one process and compares.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.sharding import is_sharded, whole
from dylora_moe.training.trainer.checkpoints import last_complete
from dylora_moe.training.trainer.distributed import leave_rank
from dylora_moe.training.trainer.interrupted import Interrupted
from dylora_moe.training.trainer.trainer import MoETrainer
from tinybase import tiny_base, tiny_tokenizer

ROWS = 8
BALANCED = {"balance_loss": "switch", "z_loss_coefficient": 0.1}
# mixture settings, trainer settings, arguments; each step sees all rows, however many processes and micro-batches
STEPS: dict[str, tuple[dict, dict, dict]] = {
    "uniform_mse": ({}, {"domain_coefficient": 0.5}, {}),
    "sequence": ({"granularity": "sequence"}, {}, {}),
    "prefix": ({"granularity": "prefix"}, {}, {}),
    "base_route": ({"route_to_base": True, "train_top_k": 2}, {}, {}),
    "two_passes": ({"router_layer": "last"}, {}, {}),
    "switch_accumulated": (BALANCED, {"domain_coefficient": 0.5}, {"gradient_accumulation_steps": 2}),
    "forced_accumulated": ({}, {"force_domains": True}, {"gradient_accumulation_steps": 2}),
    "checkpointed": (BALANCED, {"domain_coefficient": 0.5}, {"activation_checkpointing": True}),
    "bf16": (BALANCED, {"domain_coefficient": 0.5}, {"bf16": True}),
    "forced_checkpointed": ({}, {"force_domains": True}, {"activation_checkpointing": True}),
}


def mixture(**options) -> DyLoraMoE:
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "balance_coefficient": 1.0}
    return DyLoraMoE.from_base(tiny_base(), MoELoraConfig(expert_names=["a", "b", "c"], **{**settings, **options}))


def rows() -> Dataset:
    """The first half belongs to a and the second to b, so that two processes see different experts; c has none."""
    return Dataset.from_list(
        [
            {"prompt": f"ask {i}", "completion": " yes" * (1 + i % 3), "domain": "a" if i < ROWS // 2 else "b"}
            for i in range(ROWS)
        ]
    )


def arguments(folder, **options) -> SFTConfig:
    settings = {
        "max_steps": 1,
        "learning_rate": 0.0,
        "activation_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        **options,
    }
    return SFTConfig(output_dir=str(folder), **settings)


class Keep(TrainerCallback):
    """Keeps gradients, gathered, and logs of the step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs = dict(logs)


def step(name: str, folder: Path, processes: int) -> dict:
    """The gradients and logs of one optimizer step."""
    settings, trainer_options, options = STEPS[name]
    keep = Keep()
    batch = ROWS // processes // options.get("gradient_accumulation_steps", 1)
    trainer = MoETrainer(
        mixture(**settings),
        args=arguments(folder, per_device_train_batch_size=batch, **options),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        callbacks=[keep],
        **trainer_options,
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    return {"grads": keep.grads, "logs": keep.logs, "fsdp": trainer.is_fsdp_enabled}


class Signal(TrainerCallback):
    """Sends SIGTERM to the last process only."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Poison(TrainerCallback):
    """The second step starts with weights that are not finite, in the last process only."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            tensor = model.expert_tensors("a")[1].tensor.data
            getattr(tensor, "_local_tensor", tensor).fill_(float("nan"))


def run(folder: Path, callbacks=(), **options) -> MoETrainer:
    """A trainer with dropout, so that the state of every process' random numbers matters."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
    settings |= {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "train_sampling_strategy": "random"}
    return MoETrainer(
        mixture(lora_dropout=0.2),
        args=arguments(folder, **{**settings, **options}),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        domain_coefficient=0.1,
    )


def resumed(folder: Path) -> dict:
    """An uninterrupted run, one that continued from its second step, and what that step restores once more."""
    first = run(folder)
    first.train()
    whole_run, log, logits = state(first.mixture), first.state.log_history, outputs(first.mixture)
    first.accelerator.wait_for_everyone()
    if first.args.should_save:
        shutil.move(folder / "checkpoint-4", folder.with_name("checkpoint-4"))
    first.accelerator.wait_for_everyone()
    second = run(folder)
    torch.manual_seed(99)  # the random numbers come from the checkpoint
    second.train(resume_from_checkpoint=True)
    sharded = [is_sharded(parameter) for parameter in second.mixture.parameters()]
    second.mixture.save_pretrained(folder / "final", is_main_process=second.args.should_save)
    end = state(second.mixture)
    outputs(second.mixture)  # leaves whole copies of some parameters behind
    second.mixture.restore(folder / "checkpoint-2")
    return {
        "tensors": (whole_run, end),
        "logs": (log, second.state.log_history),
        "logits": logits,
        "restored": (state(second.mixture), outputs(second.mixture)),
        "sharded": sum(sharded) / len(sharded),
    }


def state(model: DyLoraMoE) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.gathered().items()}


def outputs(model: DyLoraMoE) -> torch.Tensor:
    """Logits of the trained mixture; every process takes part."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.arange(24).view(2, 12)).logits
    model.train()
    return whole(logits)


def stopped(folder: Path) -> dict:
    """A signal that reaches one process stops all after the same step; so does a loss that is not finite in one."""
    found = {}
    try:
        run(folder, [Signal()]).train()
    except Interrupted as error:
        found["code"] = error.exit_code
    found["saved"] = last_complete(folder).name
    try:
        run(folder / "poisoned", [Poison()], save_strategy="no").train()
    except FloatingPointError as error:
        found["loss"] = str(error)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, found)
    return {"found": everywhere}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        found = step(name, folder / name, 2) if name in STEPS else globals()[name](folder / name)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    dist.destroy_process_group()
    leave_rank()


if __name__ == "__main__":
    main()
