"""Routed answers are the library's: alone, in batches, in chunks of 64 tokens and with a warm prefix cache."""

from pathlib import Path

import pytest

from comparison import check, reference, requests, run

CASES = (
    "top2",
    "top1",
    "dense",
    "two",
    "eight",
    "prefix",
    "linear",
    "temperature",
    "route_to_base",
    "closed_form",
    "closed_form_prefix",
    "prefix_window",
    "prefix_gemma2",
)


@pytest.mark.parametrize("case", CASES)
def test_routed(case: str, references: Path, tmp_path: Path) -> None:
    folder, answers = reference(case, references)
    rows = answers["routed"]
    asked = requests(rows)
    new = len(rows[0]["tokens"])
    cold, warm, alone = run(
        folder, [{"requests": asked}, {"requests": asked}, {"requests": asked, "alone": True}], new, tmp_path
    )
    check(f"{case}, batch", cold, rows)
    check(f"{case}, batch again", warm, rows)
    check(f"{case}, alone", alone, rows)
    assert sum(answer["cached"] for answer in warm) > 0


@pytest.mark.parametrize("case", ["top2", "prefix"])
def test_compiled(case: str, references: Path, tmp_path: Path) -> None:
    folder, answers = reference(case, references)
    rows = answers["routed"]
    (batch,) = run(folder, [{"requests": requests(rows)}], len(rows[0]["tokens"]), tmp_path, enforce_eager=False)
    check(f"{case}, compiled", batch, rows)


@pytest.mark.parametrize("case", ["top2", "prefix"])
def test_tensor_parallel(case: str, references: Path, tmp_path: Path) -> None:
    folder, answers = reference(case, references)
    rows = answers["routed"]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    (batch,) = run(
        folder,
        [{"requests": requests(rows)}],
        len(rows[0]["tokens"]),
        tmp_path,
        tensor_parallel_size=2,
        environment=environment,
    )
    check(f"{case}, tensor parallel 2", batch, rows)


def test_smollm2(references: Path, tmp_path: Path) -> None:
    folder, answers = reference("smollm2", references)
    mixed(folder, answers, "smollm2", tmp_path)


def test_fixed_mixture_and_fewer_slots_than_selectors(references: Path, tmp_path: Path) -> None:
    folder, answers = reference("fixed", references)
    mixed(folder, answers, "fixed", tmp_path, max_loras=1)


def test_speculative(references: Path, tmp_path: Path) -> None:
    folder, answers = reference("top2", references)
    rows = answers["routed"]
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    (batch,) = run(folder, [{"requests": requests(rows)}], 24, tmp_path, speculative_config=ngram)
    check("top2, ngram", batch, rows)


@pytest.mark.parametrize("case", ["top2", "prefix"])
def test_mixed_with_forced(case: str, references: Path, tmp_path: Path) -> None:
    folder, answers = reference(case, references)
    mixed(folder, answers, case, tmp_path)


def mixed(folder: Path, answers: dict, case: str, scratch: Path, **engine: int) -> None:
    """Routed and forced requests for the same prompts, all at once in one engine, twice."""
    kinds = [None if who == "routed" else who for who in answers]
    asked = [
        request
        for rows in zip(*(requests(answers[who or "routed"], who) for who in kinds), strict=True)
        for request in rows
    ]
    new = len(answers["routed"][0]["tokens"])
    engine = {"enable_lora": True, "max_loras": len(kinds) - 1, "max_lora_rank": 8} | engine
    rounds = run(folder, [{"requests": asked}] * 2, new, scratch, **engine)
    for round_, outs in zip(("cold", "warm"), rounds, strict=True):
        for at, who in enumerate(kinds):
            what = f"{case}, {len(asked)} mixed {round_}, {who or 'routed'}"
            check(what, outs[at :: len(kinds)], answers[who or "routed"])
