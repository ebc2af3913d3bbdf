"""The table of variants."""

from __future__ import annotations

import pytest

from dylora_moe.benchmark.kinds import KINDS, WORKS
from dylora_moe.mixing import FORM_NAMES


@pytest.mark.parametrize("key", KINDS)
def test_every_variant_can_be_built_and_named(key):
    kind = KINDS[key]
    assert kind.form in FORM_NAMES
    assert kind.works
    assert set(kind.works) <= set(WORKS)
    assert "{" not in kind.title.format(r=4, R=8, E=2, k=1)
    assert kind.per_experts == (kind.family in ("ours", "passes", "xlora", "engine") or kind.wide)


def test_every_fast_form_is_compared():
    assert {kind.form for kind in KINDS.values()} == set(FORM_NAMES)
