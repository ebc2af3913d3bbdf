"""Whole layer stacks: prefill, a training step and a decoded token of base, PEFT and mixtures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from dylora_moe.benchmark.counts import peak_on_gpu
from dylora_moe.benchmark.timing import FAILURES, Step, captured, compare, interleaved
from dylora_moe.config import MoELoraConfig
from dylora_moe.layers.in_force import Generation
from dylora_moe.mixing import kernels
from dylora_moe.model import DyLoraMoE
from dylora_moe.routing.call import Call

from .setting import ACTIVE, EXPERTS, MANY, Setting


@contextmanager
def torch_alone() -> Iterator[None]:
    """Every layer does without our kernels."""
    with patch.object(kernels, "available", lambda x: False):
        yield


def build_base(setting: Setting) -> LlamaForCausalLM:
    sizes = setting.sizes
    torch.manual_seed(0)
    torch.set_default_dtype(setting.dtype)
    try:
        with setting.device:
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"],
                    intermediate_size=sizes["intermediate"], num_attention_heads=sizes["hidden"] // sizes["head"],
                    num_key_value_heads=sizes["kv"] // sizes["head"], max_position_embeddings=8192,
                    bos_token_id=None, eos_token_id=None,
                )
            )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def build_peft(setting: Setting, rank: int) -> Any:
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(build_base(setting), config, autocast_adapter_dtype=False)


def build_mixture(setting: Setting, experts: int, active: int | None) -> DyLoraMoE:
    rank = setting.sizes["rank"]
    config = MoELoraConfig(
        num_experts=experts,
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        init_lora_weights=False,
        layers_to_transform=list(range(setting.sizes["layers"])),
        router_layer=0,
        top_k=active or experts,
        train_top_k=active,
    )
    return DyLoraMoE(build_base(setting), config, autocast_adapter_dtype=False)


def variants(setting: Setting) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Name → model and the context in which it runs."""
    rank = setting.sizes["rank"]
    base = build_base(setting)
    base.enable_input_require_grads()
    found: dict[str, tuple[Any, Callable[[], Any]]] = {
        "base": (base, nullcontext),
        "base again": (base, nullcontext),
        f"PEFT r={rank}": (build_peft(setting, rank), nullcontext),
        f"PEFT r={rank * EXPERTS}": (build_peft(setting, rank * EXPERTS), nullcontext),
    }
    for name, model in {
        f"mixture E={EXPERTS} dense": build_mixture(setting, EXPERTS, None),
        f"mixture top-{ACTIVE} of {MANY}": build_mixture(setting, MANY, ACTIVE),
    }.items():
        found[f"{name}, kernels"] = (model, nullcontext)
        found[f"{name}, torch alone"] = (model, torch_alone)
    return found


class Seen(TorchDispatchMode):
    """Counts the calls of our operators and the times that a tensor is read back to the host."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "dylora_moe":
            self.counts["kernel_calls"] += 1
        if function is torch.ops.aten._local_scalar_dense.default:
            self.counts["host_reads"] += 1
        return function(*args, **(kwargs or {}))


def look(model: Any, step: Step) -> dict[str, Any]:
    """What one step costs besides time: peak bytes above what was there, kernel calls, reads by the host."""
    with Seen() as seen:
        step()
    found = {"kernel_calls": seen.counts["kernel_calls"], "host_reads": seen.counts["host_reads"]}
    found["model_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    if next(model.parameters()).device.type == "cuda":
        model.zero_grad()
        found["peak_bytes_of_step"] = peak_on_gpu(step)
        found["peak_bytes"] = found["peak_bytes_of_step"] + found["model_bytes"]
    model.zero_grad()
    return found


def measured(
    setting: Setting,
    deadline: float,
    prepare: Callable[[Any], tuple[Step, dict[str, Any]]],
    repeats: int = 1,
    reset: Step = lambda: None,
) -> dict[str, Any]:
    """Time what `prepare(model)` makes of every variant; one that fails is left out with the reason.

    `reset` runs before each timing.
    """
    steps, contexts, notes, failed = {}, {}, {}, {}
    for name, (model, contexts[name]) in variants(setting).items():
        try:
            with contexts[name]():
                steps[name], notes[name] = prepare(model)
        except FAILURES as error:
            failed[name] = f"{type(error).__name__}: {error}"
    if "base" not in steps:
        raise RuntimeError(f"the bare base failed, so there is nothing to compare with: {failed['base']}")

    @contextmanager
    def turn(name: str) -> Iterator[None]:
        reset()
        with contexts[name]():
            yield

    rounds = setting.sizes["rounds"]
    times = interleaved(
        steps, rounds, repeats=repeats, device=setting.device, around=turn, deadline=deadline
    )  # fmt: skip
    rows = [{"variant": name, **row, **notes[name]} for name, row in compare(times, "base").items()]
    return {"rows": rows, "failed": failed}


def prefill(setting: Setting, deadline: float) -> dict[str, Any]:
    """One prompt through the model, without gradients; the last position's logits only, as `generate` does."""
    ids = setting.ids(1, setting.sizes["prompt"])

    def prepare(model: Any) -> tuple[Step, dict[str, Any]]:
        model.eval()

        def step() -> None:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False, logits_to_keep=1)

        return step, look(model, step)

    return {"tokens": ids.numel(), **measured(setting, deadline, prepare)}


def training(setting: Setting, deadline: float) -> dict[str, Any]:
    """Forward and backward of the language-model loss, gradients freed first."""
    ids = setting.ids(setting.sizes["batch"], setting.sizes["length"])

    def prepare(model: Any) -> tuple[Step, dict[str, Any]]:
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]

        def step() -> None:
            for parameter in trained:  # as an optimizer does
                parameter.grad = None
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        return step, look(model, step)

    return {"tokens": ids.numel(), **measured(setting, deadline, prepare)}


def decoding(setting: Setting, deadline: float) -> dict[str, Any]:
    """One token after a prompt in a static cache, called as `generate` calls it and captured as a CUDA graph."""
    prompt, room = setting.sizes["prompt"] // 4, 64
    ids = setting.ids(1, prompt)
    caches: list[Any] = []
    kept: list[Generation] = []

    def rewind() -> None:
        for cache in caches:
            for layer in cache.layers:
                layer.cumulative_length.fill_(prompt)

    def prepare(model: Any) -> tuple[Step, dict[str, Any]]:
        model.eval()
        inner = model if isinstance(model, LlamaForCausalLM) else model.get_base_model()
        cache = StaticCache(config=inner.config, max_cache_len=prompt + room)
        token, generation = ids[:, -1:].clone(), Generation()
        kept.append(generation)  # a captured graph reads its packed matrices

        def step() -> None:
            with torch.no_grad(), _generating(model, generation):
                inner(input_ids=token, past_key_values=cache, use_cache=True)

        with torch.no_grad():
            inner(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        caches.append(cache)
        step()
        notes = look(model, step)
        replay, reason = captured(step, setting.device)
        rewind()
        if reason:
            notes["without_graph"] = reason
        return replay, notes

    repeats = min(setting.sizes["calls"], room // 4)
    return {"prompt": prompt, **measured(setting, deadline, prepare, repeats, rewind)}


def _generating(model: Any, generation: Generation) -> AbstractContextManager[None]:
    """As within `generate`: packed matrices are kept from step to step."""
    return model.hooks.calling(Call(), generation) if isinstance(model, DyLoraMoE) else nullcontext()
