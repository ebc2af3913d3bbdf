"""Saved activation bytes and time of one training step: a mixture of E experts against PEFT and the plain loop.

    python benchmarks/memory.py
    python benchmarks/memory.py --experts 8 --rank 16 --layers 12 --width 576 --batch 4 --length 128 --rounds 7

All variants run in one process on the same base shape, interleaved in random order; times are medians of per-round
ratios to one PEFT adapter of rank r·E (the same arithmetic as the mixture), with the base alone and the base again
as the noise floor. Bytes are what autograd keeps for the backward pass, every storage once, parameters left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from dylora_moe import DyLoraMoE, MoELoraConfig


def saved_bytes(model: Any, step: Callable[[], Any]) -> int:
    """Bytes that autograd keeps during `step`, each storage counted once, without the model's parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def variants(args: argparse.Namespace) -> dict[str, tuple[Any, Callable[[], torch.Tensor]]]:
    """Name → (model, a function that runs the forward of a training step and returns its loss)."""
    ids = torch.randint(0, args.vocabulary, (args.batch, args.length))
    everything = list(range(args.layers))

    def base() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=args.vocabulary,
                hidden_size=args.width,
                intermediate_size=args.width * 8 // 3 // 16 * 16,
                num_hidden_layers=args.layers,
                num_attention_heads=args.width // 64,
                num_key_value_heads=max(1, args.width // 192),
            )
        )

    def peft(rank: int) -> Any:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(base(), config)

    def mixture() -> DyLoraMoE:
        config = MoELoraConfig(
            num_experts=args.experts,
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules="all-linear",
            layers_to_transform=everything,
            router_layer=0,
        )
        return DyLoraMoE.from_base(base(), config)

    def loss_of(model: Any) -> Callable[[], torch.Tensor]:
        return lambda: model(input_ids=ids, labels=ids).loss

    def loop_of(model: Any) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            model.moe_config.mixing_form = "reference"
            try:
                return model(input_ids=ids, labels=ids).loss
            finally:
                model.moe_config.mixing_form = "auto"

        return step

    one, wide, ours = peft(args.rank), peft(args.rank * args.experts), mixture()
    return {
        f"PEFT, one adapter r={args.rank}": (one, loss_of(one)),
        f"PEFT, one adapter r={args.rank * args.experts}": (wide, loss_of(wide)),
        f"PEFT, one adapter r={args.rank * args.experts} (again)": (wide, loss_of(wide)),
        f"mixture, E={args.experts} r={args.rank}": (ours, loss_of(ours)),
        f"weighted loop, E={args.experts} r={args.rank}": (ours, loop_of(ours)),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant: saved bytes and their ratio, time ratio with its spread."""
    runs = variants(args)
    names = list(runs)
    reference = names[1]
    nbytes = {name: saved_bytes(model, step) for name, (model, step) in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for round_number in range(args.rounds + 1):  # the first warms up
        for name in order.sample(names, len(names)):
            model, step = runs[name]
            model.zero_grad()
            started = time.perf_counter()
            step().backward()
            if round_number:
                times[name].append(time.perf_counter() - started)
    rows = []
    for name in names:
        ratios = sorted(a / b for a, b in zip(times[name], times[reference], strict=True))
        rows.append(
            {
                "variant": name,
                "saved_mb": round(nbytes[name] / 2**20, 2),
                "saved_ratio": round(nbytes[name] / nbytes[reference], 3),
                "time_ratio": round(statistics.median(ratios), 3),
                "time_low": round(ratios[0], 3),
                "time_high": round(ratios[-1], 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "experts": 8, "rank": 16, "layers": 12, "width": 576, "batch": 4, "length": 128, "vocabulary": 4096, "rounds": 7
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    rows = measure(args)
    table = Table(title=f"Training step, {args.layers} layers of width {args.width}, batch {args.batch}×{args.length}")
    for column in ("variant", "saved MB", "ratio", "time ratio", "range"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        spread = f"{row['time_low']:.2f}-{row['time_high']:.2f}"
        cells = (f"{row['saved_mb']:.1f}", f"{row['saved_ratio']:.3f}", f"{row['time_ratio']:.3f}", spread)
        table.add_row(row["variant"], *cells)
    Console().print(table)
    if args.json:
        arguments = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"arguments": arguments, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
