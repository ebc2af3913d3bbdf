"""One layer stack of an 8B model on a GPU: base, PEFT and mixtures, with the Triton kernels and with torch alone.

    benchmarks/gpu.sh                     # a GPU, at most ten minutes, one JSON file in benchmarks/results/
    benchmarks/gpu.sh --tiny --out x.json # the same on small shapes, on a CPU if need be: tests the logic only

Each phase runs in a process of its own, so that one that fails or hangs costs only itself: `checks` (kernels against
float64), `kernels` (against torch, call by call), `prefill`, `training` (forward and backward) and `decoding` (one
token, static cache, CUDA graph). Within a phase all variants are in memory and take turns in random order; a ratio is
the median over the rounds of variant / base, with the 95 % bootstrap interval of that median, and the base measured a
second time under another name is the noise floor. Weights are random, the base is frozen, and its backward pass goes
down to the embeddings.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from shutil import which
from typing import Any
from unittest.mock import patch

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from turns import FAILURES, GPU, Step, captured, compare, interleave, look

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.mixing import kernels

PHASES = {"checks": 60, "kernels": 90, "prefill": 110, "training": 130, "decoding": 150}
"""Name → seconds it may take, the start included."""
LARGE = {
    "hidden": 4096, "kv": 1024, "intermediate": 14336, "head": 128, "layers": 4, "vocabulary": 4096, "rank": 16,
    "prompt": 2048, "batch": 4, "length": 512, "rounds": 40, "calls": 20,
}  # fmt: skip
TINY = {
    "hidden": 64, "kv": 32, "intermediate": 96, "head": 16, "layers": 2, "vocabulary": 64, "rank": 4,
    "prompt": 24, "batch": 2, "length": 12, "rounds": 3, "calls": 2,
}  # fmt: skip
EXPERTS, MANY, ACTIVE = 8, 64, 2
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-5}
"""Largest difference from float64, of the largest element: one rounding of the output and one of H, twice over."""
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32


@contextmanager
def torch_alone() -> Iterator[None]:
    """Every layer does without our kernels."""
    with patch.object(kernels, "available", lambda x: False):
        yield


def layer_shapes(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """D and O of every linear layer that occurs."""
    hidden, wide = sizes["hidden"], sizes["intermediate"]
    return {
        "q and o": (hidden, hidden), "k and v": (hidden, sizes["kv"]), "gate and up": (hidden, wide),
        "down": (wide, hidden),
    }  # fmt: skip


def random_layer(T: int, D: int, O: int, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Inputs of the dense and the gathered kernels; sums have a variance of about one."""

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE)

    R, rows = sizes["rank"], sizes["rank"] * EXPERTS
    return {
        "x": normal(T, D), "y": normal(T, O),
        "A": normal(rows, D, scale=D**-0.5), "B": normal(O, rows, scale=rows**-0.5),
        "gates": torch.rand(T, rows, device=DEVICE).to(DTYPE), "Hw": normal(T, rows),
        "A_e": normal(MANY, R, D, scale=D**-0.5), "B_e": normal(MANY, R, O, scale=R**-0.5),
        "indices": torch.rand(T, MANY, device=DEVICE).argsort(-1)[:, :ACTIVE],
        "gates_k": torch.rand(T, ACTIVE, device=DEVICE).to(DTYPE), "Hw_k": normal(T, ACTIVE, R),
    }  # fmt: skip


CALLS: dict[str, tuple[Callable[[dict], Any], Callable[[dict], Any]]] = {
    "shrink": (
        lambda t: kernels.shrink(t["x"], t["A"], t["gates"])[1],
        lambda t: F.linear(t["x"], t["A"]) * t["gates"],
    ),
    "expand": (
        lambda t: kernels.expand_(t["y"], t["Hw"], t["B"]),
        lambda t: t["y"].addmm_(t["Hw"], t["B"].T),
    ),
    "gathered_shrink": (
        lambda t: kernels.gathered_shrink(t["x"], t["A_e"], t["indices"], t["gates_k"]),
        lambda t: torch.bmm(
            t["A_e"].index_select(0, t["indices"].flatten()).view(len(t["x"]), -1, t["x"].shape[1]),
            t["x"].unsqueeze(-1),
        ).view(t["Hw_k"].shape) * t["gates_k"].unsqueeze(-1),
    ),
    "gathered_expand": (
        lambda t: kernels.gathered_expand_(t["y"], t["Hw_k"], t["B_e"], t["indices"]),
        lambda t: t["y"].add_(torch.bmm(
            t["Hw_k"].flatten(1).unsqueeze(1),
            t["B_e"].index_select(0, t["indices"].flatten()).view(len(t["y"]), -1, t["y"].shape[1]),
        ).squeeze(1)),
    ),
}  # fmt: skip
"""Kernel → itself, and torch's best way to the same numbers."""


def cases(sizes: dict[str, int]) -> Iterator[tuple[str, str, int, int, int]]:
    """Kernel, layer, T, D and O of everything to check and to measure."""
    for layer, (D, O) in layer_shapes(sizes).items():
        for name in CALLS:
            for T in (1, 4) if name.startswith("gathered") else (1, sizes["prompt"]):
                yield name, layer, T, D, O


def phase_checks(sizes: dict[str, int], deadline: float) -> dict[str, Any]:
    """Every kernel at every shape against float64, beside torch's own error."""
    rows = []
    for name, layer, T, D, O in cases(sizes):
        tensors = random_layer(T, D, O, sizes)
        double = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        expected = CALLS[name][1](double)
        row = {"kernel": name, "layer": layer, "tokens": T}
        for way, call in zip(("kernel", "torch"), CALLS[name], strict=True):
            found = call({k: v.clone() for k, v in tensors.items()})
            row[f"error_of_{way}"] = float((found.double() - expected).abs().max() / expected.abs().max())
        row["passed"] = row["error_of_kernel"] <= TOLERANCE[DTYPE]
        rows.append(row)
    return {"tolerance": TOLERANCE[DTYPE], "passed": all(row["passed"] for row in rows), "rows": rows}


def phase_kernels(sizes: dict[str, int], deadline: float) -> dict[str, Any]:
    """Each kernel against torch, as a CUDA graph of calls on changing inputs, so that L2 does not hold the matrices."""
    rows = []
    for name, layer, T, D, O in cases(sizes):
        copies = min(sizes["calls"], max(2, 2**27 // (2 * MANY * sizes["rank"] * (D + O))))
        inputs = [random_layer(T, D, O, sizes) for _ in range(copies)]
        steps, without_graph = {}, None
        for way, call in zip(("kernel", "torch", "torch again"), (*CALLS[name], CALLS[name][1]), strict=True):
            turns = [inputs[i % copies] for i in range(sizes["calls"])]
            step, reason = captured(lambda call=call, turns=turns: [call(tensors) for tensors in turns])
            steps[way], without_graph = step, reason or without_graph
        times = interleave(steps, sizes["rounds"], 1, deadline, lambda: None)
        for way, row in compare(times, "torch").items():
            row["ms"] /= sizes["calls"]
            rows.append({"kernel": name, "layer": layer, "tokens": T, "way": way, **row})
            if without_graph:
                rows[-1]["without_graph"] = without_graph
    return {"rows": rows}


def build_base(sizes: dict[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
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


def build_peft(sizes: dict[str, int], rank: int) -> Any:
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(build_base(sizes), config, autocast_adapter_dtype=False)


def build_mixture(sizes: dict[str, int], experts: int, active: int | None) -> DyLoraMoE:
    config = MoELoraConfig(
        num_experts=experts,
        r=sizes["rank"],
        lora_alpha=2 * sizes["rank"],
        target_modules="all-linear",
        init_lora_weights=False,
        layers_to_transform=list(range(sizes["layers"])),
        router_layer=0,
        top_k=active or experts,
        train_top_k=active,
    )
    return DyLoraMoE(build_base(sizes), config, autocast_adapter_dtype=False)


def variants(sizes: dict[str, int]) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Name → model and the context in which it runs."""
    rank = sizes["rank"]
    base = build_base(sizes)
    base.enable_input_require_grads()
    found: dict[str, tuple[Any, Callable[[], Any]]] = {
        "base": (base, nullcontext),
        "base again": (base, nullcontext),
        f"PEFT r={rank}": (build_peft(sizes, rank), nullcontext),
        f"PEFT r={rank * EXPERTS}": (build_peft(sizes, rank * EXPERTS), nullcontext),
    }
    for name, model in {
        f"mixture E={EXPERTS} dense": build_mixture(sizes, EXPERTS, None),
        f"mixture top-{ACTIVE} of {MANY}": build_mixture(sizes, MANY, ACTIVE),
    }.items():
        found[f"{name}, kernels"] = (model, nullcontext)
        found[f"{name}, torch alone"] = (model, torch_alone)
    return found


def run_models(
    sizes: dict[str, int],
    deadline: float,
    prepare: Callable[[Any, Any], tuple[Step, dict[str, Any]]],
    calls: int,
    reset: Step,
) -> dict[str, Any]:
    """Measure what `prepare(model, context)` makes of every variant; one that fails is left out with the reason."""
    steps, notes, failed = {}, {}, {}
    for name, (model, context) in variants(sizes).items():
        try:
            steps[name], notes[name] = prepare(model, context)
        except FAILURES as error:
            failed[name] = f"{type(error).__name__}: {error}"
    if "base" not in steps:
        raise RuntimeError(f"the bare base failed, so there is nothing to compare with: {failed['base']}")
    rows = compare(interleave(steps, sizes["rounds"], calls, deadline, reset), "base")
    return {"rows": [{"variant": name, **row, **notes[name]} for name, row in rows.items()], "failed": failed}


def random_ids(sizes: dict[str, int], batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, sizes["vocabulary"], (batch, length), device=DEVICE)


def phase_prefill(sizes: dict[str, int], deadline: float) -> dict[str, Any]:
    """One prompt through the model, without gradients; the last position's logits only, as `generate` does."""
    ids = random_ids(sizes, 1, sizes["prompt"])

    def prepare(model: Any, context: Any) -> tuple[Step, dict[str, Any]]:
        model.eval()

        def step() -> None:
            with torch.no_grad(), context():
                model(input_ids=ids, use_cache=False, logits_to_keep=1)

        return step, look(model, step)

    return {"tokens": ids.numel(), **run_models(sizes, deadline, prepare, 1, lambda: None)}


def phase_training(sizes: dict[str, int], deadline: float) -> dict[str, Any]:
    """Forward and backward of the language-model loss, gradients freed first."""
    ids = random_ids(sizes, sizes["batch"], sizes["length"])

    def prepare(model: Any, context: Any) -> tuple[Step, dict[str, Any]]:
        model.train()

        def step() -> None:
            model.zero_grad()
            with context():
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        return step, look(model, step)

    return {"tokens": ids.numel(), **run_models(sizes, deadline, prepare, 1, lambda: None)}


def phase_decoding(sizes: dict[str, int], deadline: float) -> dict[str, Any]:
    """One token after a prompt in a static cache, called as `generate` calls it and captured as a CUDA graph."""
    prompt, room = sizes["prompt"] // 4, 64
    ids = random_ids(sizes, 1, prompt)
    caches: list[StaticCache] = []
    kept = []  # what the graphs read

    def rewind() -> None:
        for cache in caches:
            for layer in cache.layers:
                layer.cumulative_length.fill_(prompt)

    def prepare(model: Any, context: Any) -> tuple[Step, dict[str, Any]]:
        model.eval()
        inner = model if isinstance(model, LlamaForCausalLM) else model.get_base_model()
        cache = StaticCache(config=inner.config, max_cache_len=prompt + room)
        token = ids[:, -1:].clone()

        def step() -> None:
            with torch.no_grad(), context():
                inner(input_ids=token, past_key_values=cache, use_cache=True)

        with torch.no_grad(), context():
            inner(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        caches.append(cache)
        if isinstance(model, DyLoraMoE):
            model.routing.packed = {}  # as `generate` does
            kept.append(model.routing.packed)
        step()
        notes = look(model, step)
        replay, reason = captured(step)
        rewind()
        if reason:
            notes["without_graph"] = reason
        return replay, notes

    return {"prompt": prompt, **run_models(sizes, deadline, prepare, min(sizes["calls"], room // 4), rewind)}


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU",
        "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__,
        "peft": peft.__version__, "python": platform.python_version(), "dtype": str(DTYPE).removeprefix("torch."),
        "kernels_available": kernels.available(torch.empty(1, device=DEVICE, dtype=DTYPE)),
    }  # fmt: skip
    if kernels._INSTALLED:
        import triton

        found["triton"] = triton.__version__
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if which("git") else ""
    return {**found, "commit": commit or None}


def run_phase(name: str, sizes: dict[str, int]) -> dict[str, Any]:
    deadline = time.monotonic() + 0.6 * PHASES[name]  # the rest is for loading and building
    if name in ("checks", "kernels") and not kernels.available(torch.empty(1, device=DEVICE, dtype=DTYPE)):
        return {"skipped": "the kernels are not available here: no triton, or no GPU"}
    phases = (phase_checks, phase_kernels, phase_prefill, phase_training, phase_decoding)
    return dict(zip(PHASES, phases, strict=True))[name](sizes, deadline)


def run_all(arguments: list[str], phases: list[str], save: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Every phase in its own process; what is there is saved after each."""
    results: dict[str, Any] = {}
    for name in phases:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "phase.json"
            command = [sys.executable, __file__, *arguments, "--phase", name, "--out", str(out)]
            try:
                done = subprocess.run(command, timeout=PHASES[name], stderr=subprocess.PIPE, text=True)
                error = None if done.returncode == 0 else done.stderr[-2000:]
            except subprocess.TimeoutExpired:
                error = f"took more than {PHASES[name]} s"
            results[name] = json.loads(out.read_text()) if out.exists() else {"error": error}
        results[name]["seconds"] = round(time.monotonic() - started, 1)
        summarize(name, results[name])
        save(results)
    return results


def summarize(name: str, result: dict[str, Any]) -> None:
    """A phase in a few lines of text."""
    print(
        f"{name} ({result['seconds']} s)",
        *(f"{k}: {result[k]}" for k in ("error", "skipped", "passed", "failed") if result.get(k) not in (None, {})),
    )
    for row in result.get("rows", []):
        if "ratio" not in row:
            continue
        label = row.get("variant") or f"{row['kernel']}, {row['layer']}, {row['tokens']} tokens: {row['way']}"
        label += " (no CUDA graph)" if "without_graph" in row and GPU else ""
        print(
            f"  {label:<60}{row['ms']:10.3f} ms{row['ratio']:8.3f}  [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a test of the logic")
    parser.add_argument("--phase", choices=list(PHASES), help="this phase only")
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/gpu-DATE-DEVICE.json")
    args = parser.parse_args()
    sizes = TINY if args.tiny else LARGE
    if not GPU and not args.tiny:
        parser.error("no GPU is visible to torch; --tiny runs small shapes on the CPU.")
    if args.phase and args.out:
        args.out.write_text(json.dumps(run_phase(args.phase, sizes)))
        return
    where = {**machine(), "sizes": sizes, "experts": EXPERTS, "top_k": f"{ACTIVE} of {MANY}"}
    device = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"gpu-{where['date'][:10]}-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    save = lambda found: out.write_text(json.dumps({"setting": where, **found}, indent=2) + "\n")  # noqa: E731
    results = run_all(["--tiny"] * args.tiny, [args.phase] if args.phase else list(PHASES), save)
    print(f"wrote {out}")
    if any("error" in found or found.get("failed") or found.get("passed") is False for found in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
