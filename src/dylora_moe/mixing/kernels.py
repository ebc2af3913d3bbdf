"""Triton kernels of the mixture as operators that torch can differentiate, compile and capture.

    shrink           H = x · A_catᵀ,  Hw = H ⊙ gates           one read of x, both results
    expand           y + Hw · B_catᵀ                           accumulated in float32, one read and one write of y
    gathered_…       the same for the K experts of each token  the others cost neither FLOPs nor bytes

Ask `available(x)` first: without triton or a GPU the callers keep to torch's own GEMMs. The operators stand outside
autocast: cast before (`dense.compute_dtype`). Nothing here reads a tensor back to the host.

Shapes: T tokens, D in, O out, E experts, R rank of one expert, ΣR the sum of the ranks, K experts per token.
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
_INSTALLED = importlib.util.find_spec("triton") is not None
_OLDEST_GPU = 8  # compute capability; older ones have no bfloat16


def available(x: Tensor) -> bool:
    """Whether the layers use the kernels on tensors like `x`: triton is installed and x is bf16, fp16 or fp32 on a GPU.

    On a GPU they are used where `DYLORA_MOE_KERNELS=1` is in the environment: no measurement says yet on which shapes
    they beat torch (`benchmarks/gpu.sh` makes it). With `TRITON_INTERPRET=1`, float32 on the CPU will do (triton's
    interpreter; for tests).
    """
    if not _INSTALLED:
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


def gathered_shrink(x: Tensor, A: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    """`A[indices[t, k]] · x[t] · gates[t, k]`, with gradients for x, A and gates; for few tokens.

    Args:
        x: `[T, D]`.
        A: `[E, R, D]`, of the dtype of x; smaller ranks filled up with zeros.
        indices: `[T, K]`, int32 or int64, each 0 … E-1 (not checked: that would read them back).
        gates: `[T, K]`, any float dtype.

    Returns:
        `[T, K, R]` in the dtype of x.
    """
    return torch.ops.dylora_moe.gathered_shrink(x, A, indices, gates)[1]


def gathered_expand(y: Tensor, Hw: Tensor, B: Tensor, indices: Tensor) -> Tensor:
    """`y[t] + Σ_k Hw[t, k] · B[indices[t, k]]` as a new tensor, with gradients for y, Hw and B; for few tokens.

    Args:
        y: `[T, O]`.
        Hw: `[T, K, R]`.
        B: `[E, R, O]`, of the dtype of Hw.
        indices: `[T, K]`, as in `gathered_shrink`.
    """
    return torch.ops.dylora_moe.gathered_expand(y, Hw, B, indices)


def gathered_expand_(y: Tensor, Hw: Tensor, B: Tensor, indices: Tensor) -> Tensor:
    """`gathered_expand` in place, for a `y` that nobody else holds and without gradients."""
    torch.ops.dylora_moe.gathered_expand_(y, Hw, B, indices)
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
    dH, dgates = _through_gates(dH, dHw, H, gates, ctx.needs_input_grad[2])
    if dH is None:
        return None, None, dgates
    dx = dH @ A if ctx.needs_input_grad[0] else None
    dA = dH.T @ x if ctx.needs_input_grad[1] else None
    return dx, dA, dgates


def _through_gates(
    dH: Tensor | None, dHw: Tensor | None, H: Tensor, gates: Tensor, need_gates: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of H and of gates of the same shape, from those of H and of Hw = H ⊙ gates."""
    if dHw is None:
        return dH, None
    dgates = (dHw * H).to(gates.dtype) if need_gates else None
    through = (dHw * gates).to(H.dtype)
    return (through if dH is None else dH + through), dgates


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


@torch.library.custom_op("dylora_moe::gathered_shrink", mutates_args=())
def _gathered_shrink(x: Tensor, A: Tensor, indices: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return launch.gathered_shrink(x, A, indices, gates)


@_gathered_shrink.register_fake
def _(x: Tensor, A: Tensor, indices: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(*indices.shape, A.shape[1]), x.new_empty(*indices.shape, A.shape[1])


def _gathered_shrink_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])
    ctx.set_materialize_grads(False)


def _gathered_shrink_backward(ctx: Any, dH: Tensor | None, dHw: Tensor | None) -> tuple:
    x, A, indices, gates, H = ctx.saved_tensors
    dH, dgates = _through_gates(dH, dHw, H, gates.unsqueeze(-1), ctx.needs_input_grad[3])
    if dgates is not None:
        dgates = dgates.sum(-1)
    if dH is None:
        return None, None, None, dgates
    rows = _by_expert(dH, indices, A.shape[0])
    dx = rows @ A.flatten(0, 1) if ctx.needs_input_grad[0] else None
    dA = (rows.T @ x).view(A.shape) if ctx.needs_input_grad[1] else None
    return dx, dA, None, dgates


def _by_expert(values: Tensor, indices: Tensor, E: int) -> Tensor:
    """`values [T, K, R]` in the columns of their experts, zero elsewhere: `[T, E·R]`.

    The backward passes are GEMMs over all experts: with few tokens they are cheaper than copies of the matrices.
    """
    T, K, R = values.shape
    place = indices.long().unsqueeze(-1).expand(T, K, R)
    return values.new_zeros(T, E, R).scatter_add(1, place, values).flatten(1)


@torch.library.custom_op("dylora_moe::gathered_expand", mutates_args=())
def _gathered_expand(y: Tensor, Hw: Tensor, B: Tensor, indices: Tensor) -> Tensor:
    return launch.gathered_expand(y, Hw, B, indices, y.new_empty(y.shape))


@_gathered_expand.register_fake
def _(y: Tensor, Hw: Tensor, B: Tensor, indices: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _gathered_expand_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gathered_expand_backward(ctx: Any, dy: Tensor) -> tuple:
    Hw, B, indices = ctx.saved_tensors
    (E, R, _), small = B.shape, dy.to(Hw.dtype)
    dHw = dB = None
    if ctx.needs_input_grad[1]:
        of_all = (small @ B.flatten(0, 1).T).view(len(dy), E, R)
        dHw = of_all.gather(1, indices.long().unsqueeze(-1).expand(Hw.shape))
    if ctx.needs_input_grad[2]:
        dB = (_by_expert(Hw, indices, E).T @ small).view(B.shape)
    return dy, dHw, dB, None


@torch.library.custom_op("dylora_moe::gathered_expand_", mutates_args=("y",))
def _gathered_expand_in_place(y: Tensor, Hw: Tensor, B: Tensor, indices: Tensor) -> None:
    launch.gathered_expand(y, Hw, B, indices, y)


_shrink.register_autograd(_shrink_backward, setup_context=_shrink_context)
_expand.register_autograd(_expand_backward, setup_context=_expand_context)
_gathered_shrink.register_autograd(_gathered_shrink_backward, setup_context=_gathered_shrink_context)
_gathered_expand.register_autograd(_gathered_expand_backward, setup_context=_gathered_expand_context)
