"""Speed inside vLLM: a mixture routed per token beside the bare base and beside vLLM's own LoRA, each in an engine.

    python benchmarks/vllm_throughput.py [--rounds 5] [--clients 1,8,32] [--eager]

Runs in the library's environment and starts the engines in vLLM's, which `make test-vllm` makes (`--python` names
another). All engines are up at once and take turns, every round in another order; a figure is the median over the
rounds of base ÷ other of the same round, of wall-clock seconds. Reading is the time for one token after prompts of
`--length`, writing what `--new` tokens take beyond it. Nothing else should run meanwhile. Results are kept as JSON in
`results/vllm/`, and `--table` writes what is there into docs/vllm.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dylora_moe import DyLoraMoE, MoELoraConfig
from dylora_moe.base.embedded import EMBEDDED, resolve_base
from dylora_moe.benchmark.marked import write_marked

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "vllm", HERE.parent / "docs" / "vllm.md"
VLLM = HERE.parent / "integrations" / "vllm" / ".venv" / "bin" / "python"
NAMES = ("red", "green", "blue", "white")
RANK, ROUTER_LAYER = 16, 7
"""Experts sit where recipes put them: on all linear layers from a quarter of the base on."""
KINDS = {
    "base": "the bare base",
    "routed": "routed, top-2 of four experts",
    "expert": "the same engine, one expert forced",
    "lora": "vLLM's own LoRA, one adapter",
}

# An engine is asked in lines: clients, tokens to write, tokens of a prompt, a seed. It answers with seconds.
ENGINE = """
import json, sys, time
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

job = json.loads(sys.argv[1])
llm = LLM(job["folder"], **job["engine"])
lora = LoRARequest("one", 1, job["adapter"]) if job["adapter"] else None
print("READY", flush=True)
for line in sys.stdin:
    clients, new, length, seed = map(int, line.split())
    draw = [[(7 * i + 13 * j + 31 * seed) % 4000 + 20 for j in range(length)] for i in range(clients)]
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in draw]
    took = []
    for tokens in (1, new):
        sampling = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
        took.append(time.perf_counter() - start)
    print("DONE", *took, flush=True)
"""


@torch.no_grad()
def write_folders(place: Path) -> None:
    """The mixture with random experts and a decided router, as a routed folder and as stock adapters."""
    source = resolve_base(EMBEDDED)
    config = MoELoraConfig(
        expert_names=list(NAMES),
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear",
        top_k=2,
        router_layer=ROUTER_LAYER,
    )
    torch.manual_seed(0)
    model = DyLoraMoE.from_base(source, config).eval()
    for layer in model.experts.layers:
        for matrix in layer.lora_B.values():
            matrix.weight.normal_(0, 0.02)
    model.router.up.mul_(6)  # pyright: ignore[reportCallIssue]  # nn.Module knows no attributes
    model.export_vllm(place / "routed")
    model.export_vllm_lora(place / "adapters")


class Engine:
    """One engine in a process of its own."""

    def __init__(self, kind: str, place: Path, python: Path, eager: bool, threads: int):
        engine: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": eager,
            "max_model_len": 256,
            "max_num_seqs": 32,
            "enable_prefix_caching": False,
        }
        selectors = kind in ("routed", "expert")
        if kind != "base":
            engine |= {
                "enable_lora": True,
                "max_loras": len(NAMES) + 1 if selectors else 1,
                "max_lora_rank": 8 if selectors else RANK,
            }
        folder = place / "routed" if selectors else Path(resolve_base(EMBEDDED))
        adapter = {"expert": place / "routed/selectors/red", "lora": place / "adapters/red"}.get(kind)
        job = {"folder": str(folder), "engine": engine, "adapter": str(adapter) if adapter else None}
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        self.log = place / f"{kind}.log"
        self.process = subprocess.Popen(
            [python, "-c", ENGINE, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=environment,
            cwd=place,
        )

    def answer(self, word: str) -> list[float]:
        """What follows `word` in the next line that begins with it."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word):
                return [float(part) for part in line.split()[1:]]
        raise SystemExit(f"an engine ended:\n{self.log.read_text()[-2000:]}")

    def ask(self, clients: int, new: int, length: int, seed: int) -> tuple[float, float]:
        """Seconds of reading and one token, and of the other tokens."""
        assert self.process.stdin
        self.process.stdin.write(f"{clients} {new} {length} {seed}\n")
        self.process.stdin.flush()
        first, whole = self.answer("DONE")
        return first, whole - first


def measure(asked: argparse.Namespace, file: Path) -> None:
    """All engines in turn: the ratios of each round, written to `file` as they come."""
    settings = {"eager": asked.eager, "threads": asked.threads, "new": asked.new, "length": asked.length}
    settings["machine"] = platform.processor() or platform.machine()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_folders(place)
        engines = {}
        for kind in KINDS:  # one after the other: two at once would not start faster
            started = time.perf_counter()
            engines[kind] = Engine(kind, place, asked.python, asked.eager, asked.threads)
            engines[kind].answer("READY")
            print(f"{kind}: up after {time.perf_counter() - started:.0f} s", flush=True)
        rows = {}
        for clients in asked.clients:
            rounds: list[dict[str, tuple[float, float]]] = []
            for number in range(asked.rounds + 1):
                order = list(KINDS)[number % len(KINDS) :] + list(KINDS)[: number % len(KINDS)]
                rounds.append({kind: engines[kind].ask(clients, asked.new, asked.length, number) for kind in order})
            rounds = rounds[1:]  # the first warms up
            rows[str(clients)] = {
                kind: {
                    "reading": [one["base"][0] / one[kind][0] for one in rounds],
                    "writing": [one["base"][1] / one[kind][1] for one in rounds],
                    "tokens_per_second": clients * (asked.new - 1) / median(one[kind][1] for one in rounds),
                }
                for kind in KINDS
            }
            file.write_text(json.dumps({"settings": settings, "clients": rows}, indent=1) + "\n")
            for kind, row in rows[str(clients)].items():
                print(
                    f"{clients} clients, {kind}: writing {median(row['writing']):.3f} of the base "
                    f"({min(row['writing']):.2f} to {max(row['writing']):.2f}), reading {median(row['reading']):.3f}, "
                    f"{row['tokens_per_second']:.0f} tokens/s",
                    flush=True,
                )
        for engine in engines.values():
            engine.process.stdin.close()
            engine.process.wait(60)


def table() -> str:
    """Everything that was measured, as ratios to the bare base."""
    lines = ["| engine | requests at once | of the base's speed, writing | reading |", "| --- | ---: | ---: | ---: |"]
    for file in sorted(RESULTS.glob("*.json")):
        found = json.loads(file.read_text())
        mode = "eager" if found["settings"]["eager"] else "compiled"
        for clients, row in found["clients"].items():
            for kind, what in KINDS.items():
                if kind != "base":
                    writing, reading = row[kind]["writing"], row[kind]["reading"]
                    lines.append(
                        f"| {what}, {mode} | {clients} | {median(writing):.2f} ({min(writing):.2f}–{max(writing):.2f}) "
                        f"| {median(reading):.2f} |"
                    )
    return "\n".join(lines)


def main() -> None:
    """Measure, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--new", type=int, default=32, help="tokens to write (default %(default)s)")
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--eager", action="store_true", help="without compiling, which takes minutes to start")
    parser.add_argument("--python", type=Path, default=VLLM, help="of vLLM's environment")
    parser.add_argument("--table", action="store_true", help="write what was measured into docs/vllm.md")
    asked = parser.parse_args()
    if asked.table:
        write_marked(PAGE, "vllm-speed", table())
        return
    if not asked.python.exists():
        parser.error(f"--python {asked.python} is not there: `make test-vllm` makes it")
    RESULTS.mkdir(parents=True, exist_ok=True)
    measure(asked, RESULTS / ("eager.json" if asked.eager else "compiled.json"))


if __name__ == "__main__":
    sys.exit(main())
