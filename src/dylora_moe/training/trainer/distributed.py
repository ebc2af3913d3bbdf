"""Several processes: what must be true of them, and what is computed over all of them.

DDP and FSDP2 start by torchrun or `accelerate launch`; see recipes/accelerate.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from dylora_moe.model import DyLoraMoE
from dylora_moe.sharding import shard_like, whole

logger = logging.getLogger(__name__)


def several_processes() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave_rank(code: object = 0) -> NoReturn:
    """End a rank with the exit code `code`, after what is registered for the end, without ending the interpreter.

    Gloo's threads may outlive `destroy_process_group`. One that frees a tensor while the interpreter ends
    aborts the process, whereupon torchrun kills the ranks that are still at work.
    """
    atexit._run_exitfuncs()  # wandb and others end their runs there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def mean_over_processes(values: Tensor, mask: Tensor | None) -> Tensor:
    """`routing.masked_mean` over the tokens of all processes; each process keeps the gradient of its own part."""
    if mask is None:
        mask = torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    kept = mask.to(values.dtype).unsqueeze(-1)
    total, count = (values * kept).flatten(0, -2).sum(0), kept.sum()
    if several_processes():
        everywhere = torch.cat([total.detach(), count[None]])
        dist.all_reduce(everywhere)
        total = total + (everywhere[:-1] - total.detach())
        count = everywhere[-1]
    return total / count.clamp(min=1)


def average(value: Tensor) -> Tensor:
    """Mean of a scalar over the processes, without a gradient; not finite if it is so anywhere."""
    value = value.detach().clone()
    if several_processes():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def greatest(number: int, device: torch.device) -> int:
    """The greatest `number` of all processes."""
    if not several_processes():
        return number
    everywhere = torch.tensor(number, device=device)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    return int(everywhere)


def times_processes(loss: Tensor) -> Tensor:
    """`loss` itself with its gradient multiplied by the number of processes, by whose number gradients are divided."""
    return loss + (dist.get_world_size() - 1) * (loss - loss.detach()) if several_processes() else loss


def drop_unused(mixture: DyLoraMoE, used: set[str]) -> None:
    """After a step of forced rows: no gradient for the router and for experts that no process `used`.

    They were touched with weight zero; a gradient of zeros would still let momentum and weight decay move them.
    """
    names = mixture.expert_names
    unused = torch.tensor([name not in used for name in names], device=next(mixture.parameters()).device).int()
    if several_processes():
        dist.all_reduce(unused, dist.ReduceOp.MIN)
    parameters = list(mixture.router.parameters())
    for name, nowhere in zip(names, unused.tolist(), strict=True):
        if nowhere:
            parameters += [part.tensor for part in mixture.expert_tensors(name)]
    for parameter in parameters:
        parameter.grad = None


# ---------------------------------------------------------------------- what must be true


def fsdp_asked(args: TrainingArguments) -> bool:
    """Whether the arguments or the launcher ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def fsdp_on_cpu(args: TrainingArguments) -> Iterator[None]:
    """Within the block accelerate may switch FSDP on for processes on the CPU, where it ignores the wish silently."""
    state: Any = PartialState._shared_state
    kind = state.get("distributed_type")
    if kind != DistributedType.MULTI_CPU or not fsdp_asked(args):
        yield
        return
    state["distributed_type"] = DistributedType.MULTI_GPU  # a kind that it knows to shard; device and backend stay
    try:
        yield
    finally:
        state["distributed_type"] = kind


def one_device(args: TrainingArguments) -> None:
    """Train on one device per process; Trainer's `nn.DataParallel` would share one routing among its threads."""
    if args.n_gpu > 1:
        logger.warning(
            "%d devices are visible, and a process trains on one of them; start more with --num-processes or torchrun.",
            args.n_gpu,
        )
        args._n_gpu = 1


def check_processes(trainer: Trainer) -> None:
    """Refuse what would train something else than was asked for.

    Raises:
        ValueError: fewer processes than the launcher started; FSDP that is off although asked for, of version 1, with
            sharded checkpoints, its own activation checkpointing or a base loaded in one process only.
    """
    started, seen = int(os.environ.get("WORLD_SIZE", "1")), trainer.accelerator.num_processes
    if started != seen:
        raise ValueError(
            f"the launcher started {started} processes, but the trainer runs in {seen}: each would train a mixture of "
            "its own. Without an accelerator pass use_cpu=True, and launch with torchrun."
        )
    if not fsdp_asked(trainer.args):
        return
    if not trainer.is_fsdp_enabled:
        raise ValueError(
            f"FSDP was asked for, but accelerate left it off (its state: {trainer.accelerator.distributed_type}); "
            "start two or more processes with torchrun."
        )
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} flattens experts, router and base into one parameter; set "
            "fsdp_version: 2."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"{plugin.state_dict_type} would save one expert and lose the others; set fsdp_state_dict_type: "
            "FULL_STATE_DICT (experts and router are small, the base is not saved)."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "accelerate's checkpointing would recompute a layer without the routing of its forward pass; set "
            "fsdp_activation_checkpointing: false and the trainer's activation_checkpointing=True."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "experts can only be put on a base that is whole in every process; set "
            "fsdp_cpu_ram_efficient_loading: false."
        )


def shard_router(router: nn.Module, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Shard the router by itself, in float32, before accelerate shards the rest in the mixed precision that it chose.

    Its policy would also cast the model's outputs, the log-probabilities of the loss among them, and the sums of the
    gradients; both are left in float32.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    policy: MixedPrecisionPolicy | None = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
    if isinstance(router, FSDPModule):
        return
    whole_parameters = list(router.parameters())
    mesh, parallelism = accelerator.torch_device_mesh, accelerator.parallelism_config
    fully_shard(
        router,
        mesh=None if mesh is None or parallelism is None else mesh[tuple(parallelism.fsdp_dim_names)],
        mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        offload_policy=plugin.cpu_offload,
        reshard_after_forward=False,  # it scores twice per step
    )
    sharded = {id(old): new for old, new in zip(whole_parameters, router.parameters(), strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [sharded.get(id(parameter), parameter) for parameter in group["params"]]


# ---------------------------------------------------------------------- the optimizer's state


def save_optimizer(trainer: Trainer, folder: str) -> None:
    """Write the states of optimizer and schedule as one process would; every process takes part in the gathering."""
    optimizer, scheduler = cast(Any, trainer.optimizer), cast(Any, trainer.lr_scheduler)
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: whole(value).cpu() if isinstance(value, Tensor) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    if trainer.args.should_save:
        torch.save(state, Path(folder, OPTIMIZER_NAME))
        torch.save(scheduler.state_dict(), Path(folder, SCHEDULER_NAME))


def load_optimizer(trainer: Trainer, folder: str) -> None:
    """Load what `save_optimizer` or one process wrote, sharded like the parameters."""
    optimizer, scheduler = cast(Any, trainer.optimizer), cast(Any, trainer.lr_scheduler)
    state = torch.load(Path(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == parameters[index].shape:
                entry[key] = shard_like(value, parameters[index])
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(torch.load(Path(folder, SCHEDULER_NAME), weights_only=True))
