"""Triton kernels of the mixture as operators that torch can differentiate, compile and capture.

    shrink           H = x · A_catᵀ,  Hw = H ⊙ gates           one read of x, both results
    expand           y + Hw · B_catᵀ                           accumulated in float32, one read and one write of y

Ask `available(x)` first: without triton or a GPU the callers keep to torch's own GEMMs. The operators stand outside
autocast: cast before (`dense.compute_dtype`). Nothing here reads a tensor back to the host.

Shapes: T tokens, D in, O out, ΣR the sum of the experts' ranks.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import launch

# Triton reads the variable when the kernels are defined, so it cannot change afterwards.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
_OLDEST_GPU = 8  # compute capability; older ones have no bfloat16


def available(x: Tensor) -> bool:
    """Whether the layers use the kernels on tensors like `x`: triton is installed and x is bf16, fp16 or fp32 on a GPU.

    On a GPU they are used where `DYLORA_MOE_KERNELS=1` is in the environment: no measurement says yet on which shapes
    they beat torch (`benchmarks/gpu.sh` makes it). With `TRITON_INTERPRET=1`, float32 on the CPU will do (triton's
    interpreter; for tests).
    """
    if not INSTALLED:
        return False
    if x.device.type == "cuda" and not _INTERPRETED:
        if os.environ.get("DYLORA_MOE_KERNELS") != "1":
            return False
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return False
        return torch.version.hip is not None or torch.cuda.get_device_properties(x.device).major >= _OLDEST_GPU
    return x.device.type == "cpu" and _INTERPRETED and x.dtype == torch.float32


def shrink(x: Tensor, A: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """`H = x · Aᵀ` and `Hw = H ⊙ gates`, with gradients for x, A and gates.

    Args:
        x: `[T, D]`.
        A: `[ΣR, D]`, of the dtype of x.
        gates: `[T, ΣR]`, any float dtype; an expanded view is read as it is.

    Returns:
        `[T, ΣR]` each, in the dtype of x. H is what a backward pass written by hand keeps.
    """
    return torch.ops.dylora_moe.shrink(x, A, gates)


def expand(y: Tensor, Hw: Tensor, B: Tensor) -> Tensor:
    """`y + Hw · Bᵀ` as a new tensor, with gradients for y, Hw and B.

    Args:
        y: `[T, O]`, the base's output.
        Hw: `[T, ΣR]`.
        B: `[O, ΣR]`, of the dtype of Hw.
    """
    return torch.ops.dylora_moe.expand(y, Hw, B)


def expand_(y: Tensor, Hw: Tensor, B: Tensor) -> Tensor:
    """`expand` in place, for a `y` that nobody else holds, inside an autograd.Function or without gradients."""
    torch.ops.dylora_moe.expand_(y, Hw, B)
    return y


@torch.library.custom_op("dylora_moe::shrink", mutates_args=())
def _shrink(x: Tensor, A: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return launch.shrink(x, A, gates)


@_shrink.register_fake
def _(x: Tensor, A: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], A.shape[0]), x.new_empty(x.shape[0], A.shape[0])


def _shrink_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, A, gates = inputs
    ctx.save_for_backward(x, A, gates, output[0])
    ctx.set_materialize_grads(False)


def _shrink_backward(ctx: Any, dH: Tensor | None, dHw: Tensor | None) -> tuple:
    x, A, gates, H = ctx.saved_tensors
    dgates = None
    if dHw is not None:
        dgates = (dHw * H).to(gates.dtype) if ctx.needs_input_grad[2] else None
        through = (dHw * gates).to(H.dtype)
        dH = through if dH is None else dH + through
    if dH is None:
        return None, None, dgates
    dx = dH @ A if ctx.needs_input_grad[0] else None
    dA = dH.T @ x if ctx.needs_input_grad[1] else None
    return dx, dA, dgates


@torch.library.custom_op("dylora_moe::expand", mutates_args=())
def _expand(y: Tensor, Hw: Tensor, B: Tensor) -> Tensor:
    return launch.expand(y, Hw, B, y.new_empty(y.shape))


@_expand.register_fake
def _(y: Tensor, Hw: Tensor, B: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _expand_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, Hw, B = inputs
    ctx.save_for_backward(Hw, B)


def _expand_backward(ctx: Any, dy: Tensor) -> tuple:
    Hw, B = ctx.saved_tensors
    small = dy.to(Hw.dtype)
    dHw = small @ B if ctx.needs_input_grad[1] else None
    dB = small.T @ Hw if ctx.needs_input_grad[2] else None
    return dy, dHw, dB


@torch.library.custom_op("dylora_moe::expand_", mutates_args=("y",))
def _expand_in_place(y: Tensor, Hw: Tensor, B: Tensor) -> None:
    launch.expand(y, Hw, B, y)


_shrink.register_autograd(_shrink_backward, setup_context=_shrink_context)
_expand.register_autograd(_expand_backward, setup_context=_expand_context)
