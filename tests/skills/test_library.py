"""The library: any order and any merging give one fit; what cannot be undone is refused; plain data comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from dylora_moe.skills.library import COMPACT_ROWS, SkillLibrary
from dylora_moe.skills.skill import ROWS_KEPT, VIEWS
from tiny import difference
from topics import NAMES, READING, WIDTH, skill

EXACT = 1e-9  # float64 through an inverse


def library(*names: str, rows: int = 5) -> SkillLibrary:
    """One skill per name, each of rows of its own."""
    made = SkillLibrary()
    for name in names or NAMES:
        made.add(name, skill(100 * NAMES.index(name), rows), READING)
    return made


def states() -> torch.Tensor:
    return torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3


def assert_same_router(found: SkillLibrary, expected: SkillLibrary) -> None:
    one, other = found.fit(), expected.fit()
    assert one.names == other.names
    scores, wanted = (states() @ fit.weight.T + fit.bias for fit in (one, other))
    assert difference(scores, wanted) <= EXACT
    assert torch.equal(scores.argmax(-1), wanted.argmax(-1))
    for kind, temperature in other.temperatures.items():
        assert one.temperatures[kind] == pytest.approx(temperature, rel=EXACT)


def assert_same_sums(found: SkillLibrary, expected: SkillLibrary) -> None:
    tensors = expected.tensors()
    assert found.tensors().keys() == tensors.keys()
    for key, tensor in found.tensors().items():
        assert difference(tensor, tensors[key]) <= EXACT, key


def test_all_120_orders_and_five_merged_libraries_give_one_fit():
    """Each skill is taught in two halves, so that sums are really added up in another order."""
    halves = {name: (skill(100 * n, 3), skill(100 * n + 3, 2, centre=n)) for n, name in enumerate(NAMES)}
    expected = SkillLibrary()
    for name, (first, second) in halves.items():
        expected.add(name, first, READING)
        expected.add(name, second, READING)
    for number, order in enumerate(permutations(NAMES)):
        found, merged = SkillLibrary(), SkillLibrary()
        for half in (0, 1) if number % 2 else (1, 0):
            for name in order:
                found.add(name, halves[name][half], READING)
                one = SkillLibrary()
                one.add(name, halves[name][half], READING)
                merged.merge(one)
        assert_same_sums(found, expected)
        assert_same_sums(merged, expected)
        assert_same_router(found if number % 2 else merged, expected)


def test_a_forgotten_skill_leaves_no_trace():
    found, never = library(), library("sql", "math", "chat", "code")
    found.forget("law")
    assert_same_sums(found, never)
    assert torch.equal(found.fit().weight, never.fit().weight)
    assert found.fit().temperatures == never.fit().temperatures
    for name in NAMES:
        if name in found:
            found.forget(name)
    assert found.reading is None  # what comes next may be read in any way


def test_renaming_keeps_the_place():
    found = library()
    found.rename("law", "legal")
    assert list(found) == ["sql", "legal", "math", "chat", "code"]
    with pytest.raises(ValueError, match="has a skill 'sql' already"):
        found.rename("legal", "sql")


CHANGES = {
    "base": "other",
    "dtype": "bfloat16",
    "quantization": "4bit",
    "layer": 2,
    "tokenizer": "other",
    "separator": " ",
    "chat_template": "a hash",
}


@pytest.mark.parametrize("field", CHANGES)
def test_texts_that_were_read_otherwise_do_not_mix(field):
    found, other = library("sql"), SkillLibrary()
    reading = replace(READING, **{field: CHANGES[field]})
    other.add("law", skill(1), reading)
    for attempt in (lambda: found.merge(other), lambda: found.add("law", skill(1), reading)):
        with pytest.raises(ValueError, match=f"{field.replace('_', ' ')} .*{CHANGES[field]}"):
            attempt()
    assert list(found) == ["sql"]


def test_united_skills_are_one_that_was_taught_all_rows():
    found, expected = library(), library("math", "chat", "code")
    for name in ("law", "sql"):
        expected.add("query", skill(100 * NAMES.index(name)), READING)
    found.unite(["sql", "law", "never"], "query")
    assert_same_sums(found, expected)
    assert_same_router(found, expected)
    assert found["query"].rows == 10
    with pytest.raises(ValueError, match="has a skill 'chat' already"):
        found.unite(["math", "code"], "chat")
    found.unite(["query", "code"], "code")
    assert set(found) == {"math", "chat", "code"}
    found.compact()
    with pytest.raises(ValueError, match="'math' is compact"):
        found.unite(["math", "chat"], "chat")
    assert set(found) == {"math", "chat", "code"}
    found.unite(["math", "never"], "maths")  # one alone is only renamed
    assert "maths" in found


def test_separation_and_sizes_are_by_skill():
    found = library()
    assert set(found.separation()) == set(found.sizes()) == set(NAMES)
    assert sum(found.sizes().values()) == found.size
    found.compact()
    assert found.pool is not None
    assert found.size - sum(found.sizes().values()) == found.pool.scatter.nbytes + found.pool.rows.nbytes


def test_merging_with_nothing_changes_nothing():
    found = library()
    found.merge(SkillLibrary())
    assert_same_sums(found, library())
    empty = SkillLibrary()
    empty.merge(found)
    assert_same_sums(empty, found)


def test_a_copy_goes_its_own_way():
    found = library("sql")
    copy = found.copy()
    copy.add("sql", skill(50), READING)
    copy.compact()
    assert found["sql"].rows == 5
    assert not found.is_compact


def test_compact_routes_the_same_and_refuses_what_it_cannot():
    found, whole = library(), library()
    found.compact()
    assert found.is_compact
    assert_same_router(found, whole)  # so few rows that all are kept
    for attempt in (
        lambda: found.add("sql", skill(50), READING),
        lambda: found.forget("sql"),
        lambda: found.merge(library("sql")),
        lambda: library("sql").merge(found),
    ):
        with pytest.raises(ValueError, match="'sql' is compact"):
            attempt()
    found.forget("sql", exact=False)
    assert list(found) == ["law", "math", "chat", "code"]


def test_compact_libraries_grow_and_merge():
    """New skills, one after the other and from another compact library, weigh the same as the old ones."""
    whole, found, other = library(), library("sql", "law"), library("code")
    found.compact()
    found.add("math", skill(200), READING)
    assert_same_router(found, library("sql", "law", "math"))
    found.compact()
    other.compact()
    found.merge(other)
    found.merge(library("chat"))
    assert_same_router(found, whole)


def test_compact_keeps_fewer_rows():
    found = library("sql", rows=ROWS_KEPT + 1)
    found.compact()
    assert len(found["sql"].views.keys) == COMPACT_ROWS


def test_size_of_a_hundred_skills_at_width_576():
    """What the tensors of a skill take, 100 times; the goal is 200 MB, 20 MB compact."""
    width, rows = 576, ROWS_KEPT

    def size(D: int, skills: int, rows: int, scatters: int) -> int:
        per_skill = 2 * 8 * D + rows * (2 * len(VIEWS) * D + 8 * 3)
        return skills * per_skill + scatters * 8 * D * (D + 1) // 2

    found = library("sql", rows=rows)
    assert found.size == size(WIDTH, 1, rows, scatters=1)  # the formula is that of the tensors
    assert size(width, 100, rows, scatters=100) < 200e6
    found.compact()
    assert found.size == size(WIDTH, 1, COMPACT_ROWS, scatters=2)
    assert size(width, 100, COMPACT_ROWS, scatters=2) < 20e6


def test_confusion_counts_every_kept_row():
    table = library().confusion()
    assert list(table) == sorted(NAMES)
    assert all(sum(row.values()) == 5 for row in table.values())
    assert sum(table[name][name] for name in NAMES) > 15  # of 25; skills differ by their means


@pytest.mark.parametrize("compact", [False, True])
def test_plain_data_comes_back(compact):
    found = library()
    if compact:
        found.compact()
    description = json.loads(json.dumps(found.description()))
    again = SkillLibrary.from_plain(found.tensors(), description)
    assert again.reading == found.reading
    assert again.description() == found.description()
    for key, tensor in found.tensors().items():
        assert torch.equal(again.tensors()[key], tensor)
    assert torch.equal(again.fit().weight, found.fit().weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, d: t.pop("law.mean"), "law.mean is missing"),
        (
            lambda t, d: t.update({"law.mean": t["law.mean"].float()}),
            r"law.mean is torch.float32 \[12\]; expected",
        ),
        (lambda t, d: t.update({"law.scatter": t["law.scatter"][1:]}), r"expected torch.float64 \[78\]"),
        (
            lambda t, d: t.update({"law.row_views": t["law.row_views"][:, :3].clone()}),
            r"has 3 views of each row; expected 4 \(prompt, completion, token, early\).*another version",
        ),
        (lambda t, d: t["law.mean"].fill_(float("nan")), "law.mean holds values that are not finite"),
        (lambda t, d: t.update(pool=t["law.scatter"]), "1 tensors belong to no skill, first pool"),
        (lambda t, d: d["skills"].pop("law"), "tensors belong to no skill, first law"),
        (lambda t, d: d["skills"]["law"].update(compact=True), "compact skills, but no pool|belong to no skill"),
        (lambda t, d: d["skills"]["law"].pop("rows"), "KeyError"),
        (lambda t, d: d["skills"]["law"].update(rows=0), "has .* tokens of 0 rows"),
        (lambda t, d: d.update(reading=None), "not how they were read"),
        (lambda t, d: d["reading"].update(layer="one"), "reading is"),
        (lambda t, d: d["reading"].update(colour="red"), "TypeError"),
        (lambda t, d: d.update(skills=[]), "missing|no skill"),
    ],
)
def test_plain_data_that_does_not_fit_is_refused(change, message):
    found = library("sql", "law")
    tensors, description = (
        {k: t.clone() for k, t in found.tensors().items()},
        json.loads(json.dumps(found.description())),
    )
    change(tensors, description)
    with pytest.raises(ValueError, match=message):
        SkillLibrary.from_plain(tensors, description)


def test_unknown_skills_are_named():
    with pytest.raises(ValueError, match=r"unknown skill 'tax'; the skills are sql\."):
        library("sql").forget("tax")
    assert "sql: 5 rows" in repr(library("sql"))
