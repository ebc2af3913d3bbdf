"""Short names: the same where they fit, else short and still different."""

from __future__ import annotations

import pytest

from dylora_moe.report.labels import labels


def test_short_names_stay():
    assert labels(["sql", "date", "sql"]) == {"sql": "sql", "date": "date"}


def test_what_long_names_share_goes():
    names = [f"customer-support-{word}-of-the-north" for word in ("billing", "returns")]
    assert list(labels([*names, "sql"]).values()) == ["…billing…", "…returns…", "sql"]


@pytest.mark.parametrize(
    "names",
    [
        ["a" * 30 + str(i) + "b" * 30 for i in range(12)],
        ["a" * 40, "a" * 41, "a" * 42],
        ["x" * 15 + str(i) + "y" * 20 + str(j) + "z" * 15 for i in range(3) for j in range(3)],
        ["one-long-name-and-no-other-that-is-like-it"],
    ],
    ids=["middle", "length", "twice", "one"],
)
def test_long_names_stay_different(names):
    short = labels(names)
    assert list(short) == names
    assert len(set(short.values())) == len(names)
    assert all(len(text) <= 28 for text in short.values())


def test_a_dollar_starts_no_formula():
    assert labels(["$x$"]) == {"$x$": r"\$x\$"}
