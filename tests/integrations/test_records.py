"""Which weights were in force when a token was written, on steps made up for it."""

import pytest
import torch
from torch import Tensor

from dylora_moe_vllm.records import Records, entry


def weights_of(request: int, positions: list[int]) -> Tensor:
    """A row per position that no other request and position has."""
    return torch.tensor([[request, position] for position in positions]).float()


def step(records: Records, spans: dict[str, list[int]], padding: int = 0, shift: float = 0.0) -> None:
    """One step in which these requests had tokens at these positions, in this order."""
    positions = torch.tensor([at for each in spans.values() for at in each] + [0] * padding)
    rows = [weights_of(int(name), each) for name, each in spans.items()]
    weights = torch.cat([*rows, torch.full((padding, 2), -1.0)]) + shift
    records.add(list(spans), {name: len(each) for name, each in spans.items()}, positions, weights)
    weights.fill_(float("nan"))  # the buffers are written again in the next step
    positions.fill_(-1)


def taken(records: Records, key: str, whole: bool = False) -> list[list[float] | None]:
    record = records.take(key)
    assert record is not None
    return record.weights(whole)


def test_chunks_in_mixed_batches():
    records = Records()
    records.begin("1", "one", 3)
    records.begin("3", "three", 2)
    step(records, {"2": [0, 1, 2], "1": [0, 1]}, padding=3)
    step(records, {"1": [2], "2": [3], "3": [0, 1]})
    step(records, {"3": [2], "2": [4], "1": [3]}, padding=1)
    assert taken(records, "one") == [[1, 2], [1, 3]]
    assert taken(records, "three", whole=True) == [[3, 0], [3, 1], [3, 2]]


def test_what_came_from_the_cache_is_unknown():
    records = Records()
    records.begin("1", "one", 5)
    step(records, {"1": [3, 4]})
    step(records, {"1": [5]})
    assert taken(records, "one", whole=True) == [None, None, None, [1, 3], [1, 4], [1, 5]]


def test_preemption_and_rejected_drafts_are_overwritten():
    records = Records()
    records.begin("1", "one", 2)
    step(records, {"1": [0, 1]}, shift=0.5)
    step(records, {"1": [2, 3, 4]}, shift=0.5)  # 3 and 4 hold drafts, which are rejected
    records.begin("1", "one", 4)  # as some runners say of a request that is resumed
    step(records, {"1": [3]})
    assert taken(records, "one") == [[1.5, 1.5], [1.5, 2.5], [1, 3], [1.5, 4.5]]


def test_only_who_asks_is_recorded():
    records = Records()
    assert not records.wanted(["1"])
    step(records, {"1": [0]})
    records.begin("1", "one", 1)
    assert records.wanted(["2", "1"])
    step(records, {"1": [0]})
    assert taken(records, "one") == [[1, 0]]
    step(records, {"1": [1]})  # one that was aborted goes on for a step
    records.end(["1", "2"])
    assert not records.wanted(["1"])
    assert records.take("one") is None
    assert records.take("another") is None


def test_what_nobody_takes_is_forgotten():
    records = Records(ended=2)
    for name in ("1", "2", "3", "4"):
        records.begin(name, f"key {name}", 1)
        step(records, {name: [0]})
    records.end(["1"])
    assert taken(records, "key 1") == [[1, 0]]
    records.end(["2", "3", "4"])
    assert records.take("key 2") is None
    assert taken(records, "key 3") == [[3, 0]]
    assert taken(records, "key 4") == [[4, 0]]


def test_a_step_without_weights_is_an_error():
    records = Records()
    records.begin("1", "one", 1)
    step(records, {"1": [0]}, shift=float("nan"))
    with pytest.raises(RuntimeError, match="left no routing weights"):
        taken(records, "one")


def test_entries_are_those_of_the_library():
    names = ["red", "green", "blue"]
    assert entry(7, " a", [0.25, 0.75, 0.0], names) == {
        "token": " a",
        "token_id": 7,
        "expert": "green",
        "weights": {"red": 0.25, "green": 0.75},
    }
    assert entry(7, "a", [0.25, 0.0, 0.15], names)["expert"] == "base"
    assert entry(7, "a", [0.25, 0.0, 0.15], names)["weights"] == {"red": 0.25, "blue": 0.15, "base": 0.6}
    assert entry(7, "a", [0.0, 0.0, 0.0], names)["weights"] == {"base": 1}
    assert entry(7, "a", [0.5, 0.5, 0.0], names)["expert"] == "red"
    assert entry(7, "a", [1 / 3, 2 / 3, 0.0], names)["weights"] == {"red": 0.333333, "green": 0.666667}
