"""What is recorded of the routing is the library's: mixed batches, chunks, prefix cache, preemption, TP, compiled."""

import json
from pathlib import Path

import pytest

from comparison import check, check_routing, reference, requests, run

RECORDING = {"worker_cls": "dylora_moe_vllm.worker.RecordingWorker"}


@pytest.mark.parametrize("case", ["top2", "prefix"])
def test_recorded(case: str, references: Path, tmp_path: Path) -> None:
    """Routed and forced requests, then again with their prompts in the cache, of which there is too little for all."""
    folder, answers = reference(case, references)
    rows, forced = answers["routed"][:24], {who: answers[who][:24] for who in ("red", "base")}
    kinds = [requests(rows, who) for who in (None, *forced)]
    asked = [request for row in zip(*kinds, strict=True) for request in row]
    engine = RECORDING | {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    engine |= {"num_gpu_blocks_override": 24, "disable_log_stats": False, "preempted": True}
    rounds = run(folder, [{"requests": asked}] * 2, len(rows[0]["tokens"]), tmp_path, **engine)
    selectors = json.loads((folder / "config.json").read_text())["dylora_moe"]["selectors"]
    for round_, outs in zip(("cold", "warm"), rounds, strict=True):
        check(f"{case}, {round_}, routed", outs[::3], rows)
        check_routing(f"{case}, {round_}, routed", outs[::3], rows)
        for at, who in enumerate(forced, 1):
            check(f"{case}, {round_}, {who}", outs[at::3], forced[who])
            for answer, row in zip(outs[at::3], forced[who], strict=True):
                written = answer["routing"]["weights"][len(row["prompt"]) - 1 :]
                assert written[: len(row["tokens"])] == [selectors[who]] * len(row["tokens"])
    assert sum(answer["cached"] for answer in rounds[1]) > 0
    assert any(None in answer["routing"]["weights"] for answer in rounds[1])


def test_tensor_parallel(references: Path, tmp_path: Path) -> None:
    folder, answers = reference("top2", references)
    rows = answers["routed"][:24]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    engine = RECORDING | {"tensor_parallel_size": 2, "environment": environment}
    (batch,) = run(folder, [{"requests": requests(rows)}], len(rows[0]["tokens"]), tmp_path, **engine)
    check("top2, tensor parallel 2", batch, rows)
    check_routing("top2, tensor parallel 2", batch, rows)


def test_compiled(references: Path, tmp_path: Path) -> None:
    folder, answers = reference("top2", references)
    rows = answers["routed"][:24]
    engine = RECORDING | {"enforce_eager": False}
    (batch,) = run(folder, [{"requests": requests(rows)}], len(rows[0]["tokens"]), tmp_path, **engine)
    check("top2, compiled", batch, rows)
    check_routing("top2, compiled", batch, rows)


def test_speculative(references: Path, tmp_path: Path) -> None:
    folder, answers = reference("top2", references)
    rows = answers["routed"][:24]
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    engine = RECORDING | {"speculative_config": ngram}
    (batch,) = run(folder, [{"requests": requests(rows)}], len(rows[0]["tokens"]), tmp_path, **engine)
    check("top2, ngram", batch, rows)
    check_routing("top2, ngram", batch, rows)
