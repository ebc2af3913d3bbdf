"""What does not depend on the machine's mood: arithmetic, GEMMs, base passes, bytes.

Every function takes a `Runner` whose `in_force` context is entered by the function. All but `peak_bytes` also work on
fake tensors.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .work import Runner

# name of the aten operator → which of its arguments is the left factor, [.., inner]
GEMMS = {
    "mm": 0,
    "mv": 0,
    "bmm": 0,
    "_grouped_mm": 0,
    "addmm": 1,
    "addmm_": 1,
    "addmv": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
    "sparse_sampled_addmm": 1,
}


def flops(runner: Runner) -> int:
    """Floating-point operations of one step."""
    with runner.in_force(), FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        runner.step()
    return counter.get_total_flops()


def _grouped_mm_flops(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """`[M, K] × [G, K, N]`, `[M, K] × [K, N]` (K ragged), `[G, M, K] × [K, N]` (N ragged) or all in groups."""
    rows = math.prod(a[:-1])
    if len(a) == 3 and len(b) == 2:  # each of the N columns belongs to one group
        rows //= a[0]
    return 2 * rows * a[-1] * b[-1]


def _added_flops(c: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _bag_flops(rows: Any, indices: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A sum of rows with weights, what a GEMM of the chosen rows does; without weights nothing is multiplied."""
    return 2 * math.prod(indices) * rows[1] if len(args) > BAG_WEIGHTS - 2 and args[BAG_WEIGHTS - 2] else 0


def _sampled_flops(pattern: Tensor, a: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """A product of which only the entries of a sparse pattern are computed."""
    return 2 * pattern._nnz() * a.shape[-1]


_sampled_flops._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode then passes tensors instead of shapes
BAG_WEIGHTS = 6  # place of the weights among the arguments of an embedding bag
BAGS = ("_embedding_bag", "_embedding_bag_forward_only")
aten = torch.ops.aten
# what FlopCounterMode does not know
FLOP_FORMULAS = {
    aten._grouped_mm: _grouped_mm_flops,
    aten.addmm_: _added_flops,
    aten.baddbmm_: _added_flops,
    aten._embedding_bag: _bag_flops,
    aten._embedding_bag_forward_only: _bag_flops,
    aten.sparse_sampled_addmm: _sampled_flops,
}


def saved_bytes(model: nn.Module, forward: Callable[[], Any], within: Sequence[nn.Module] | None = None) -> int:
    """Bytes that autograd keeps during `forward`, each storage once, without the model's parameters.

    Args:
        model: whose parameters are left out.
        forward: is called once.
        within: count only what is kept while one of these modules runs.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, int] = {}
    kept = []
    inside = _Inside(within) if within is not None else None

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and (inside is None or inside.depth):
            storages[storage._cdata] = storage.nbytes()
        kept.append(tensor.untyped_storage())  # so that no address is used twice
        return tensor.detach()  # the output of the node that keeps it would close a circle that nothing frees

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
    finally:
        if inside is not None:
            inside.leave()
    return sum(storages.values())


def saved(runner: Runner, in_layers: bool = False) -> int:
    """`saved_bytes` of a runner's forward pass, or those of them that its adapted layers keep."""
    with runner.in_force():
        return saved_bytes(runner.model, runner.forward, runner.layers if in_layers else None)


class _Inside:
    """Whether one of some modules runs; they may be nested."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.depth = 0
        self.handles = []
        for module in modules:
            self.handles.append(module.register_forward_pre_hook(lambda *_: self._step(1)))
            self.handles.append(module.register_forward_hook(lambda *_: self._step(-1)))

    def _step(self, by: int) -> None:
        self.depth += by

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()


def base_passes(runner: Runner) -> float:
    """Forward passes through all decoder layers, over those that the bare base needs."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handles = [section.register_forward_pre_hook(count) for section in runner.sections]
    try:
        with runner.in_force():
            runner.forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls / (len(runner.sections) * runner.passes)


class _Gemms(TorchDispatchMode):
    """Inner dimensions of the GEMMs that are dispatched while `inside`."""

    def __init__(self, inside: _Inside):
        super().__init__()
        self.inside, self.inner = inside, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__ if self.inside.depth else ""
        if name in GEMMS:
            self.inner[args[GEMMS[name]].shape[-1]] += 1
        elif name in BAGS and len(args) > BAG_WEIGHTS and args[BAG_WEIGHTS] is not None:
            self.inner[args[1].numel() // max(1, args[2].numel())] += 1
        return func(*args, **(kwargs or {}))


def gemms(runner: Runner) -> Counter:
    """Inner dimension → GEMMs dispatched in the forward pass inside one section, averaged over sections and passes."""
    mode = _Gemms(_Inside(runner.sections))
    try:
        with runner.in_force(), mode:
            runner.forward()
    finally:
        mode.inside.leave()
    share = len(runner.sections) * runner.passes
    return Counter({inner: count / share for inner, count in mode.inner.items()})  # pyright: ignore


def added_gemms(found: Counter, base: Counter, adapted: float) -> float:
    """GEMMs that a variant adds to the base's own, per adapted layer."""
    return (sum(found.values()) - sum(base.values())) / adapted


def shrinks(found: Counter, base: Counter, ranks: set[int], widths: set[int]) -> float | None:
    """GEMMs that shrink an adapted layer's input, per section; None if a rank equals a width and they look alike.

    Args:
        found, base: of `gemms`.
        ranks: the inner dimensions that an expanding GEMM can have.
        widths: input widths of the adapted layers.
    """
    if ranks & widths:
        return None
    return sum(found[width] - base[width] for width in widths)


def peak_bytes(runner: Runner) -> int:
    """The most memory that one step holds beyond what was held before it; gradients included.

    On a GPU by the allocator's own count, elsewhere by the profiler's allocation events.
    """
    if runner_device(runner).type == "cuda":
        with runner.in_force():
            return peak_on_gpu(runner.step)
    with (
        runner.in_force(),
        _quiet(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        result = runner.step()
    del result
    held = most = 0
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def peak_on_gpu(step: Callable[[], Any]) -> int:
    """The most bytes that `step` holds on the current GPU beyond what was held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ code writes to standard error."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def runner_device(runner: Runner) -> torch.device:
    """Where a variant runs."""
    return next(runner.model.parameters()).device


def graph_breaks(runner: Runner) -> int:
    """Breaks in the graph of the forward pass, by `torch._dynamo.explain`."""
    import torch._dynamo

    torch._dynamo.reset()
    with runner.in_force():
        explained = torch._dynamo.explain(runner.forward)()
    torch._dynamo.reset()
    return explained.graph_break_count


def floor(work: str, rank: int, widths: tuple[int, int]) -> float:
    """The least FLOPs of an adapted layer over those of the base's, with ΣR = `rank` active per token.

    Forward: base 2·D·O, adapter 2·R·(D+O). Training counts the base's forward and its input's gradient, and three
    times the adapter's forward: forward, the gradients of the factors, and of what they were applied to.
    """
    D, O = widths
    extra = rank * (D + O) / (D * O)
    return 1 + (1.5 if work in ("train", "linear-train") else 1.0) * extra
