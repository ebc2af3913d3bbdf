"""Colours: one per expert, whatever else is shown, and legible on both themes."""

from __future__ import annotations

import pytest

from dylora_moe.report.colours import DARK, LIGHT, contrast, expert_colours, legible


def channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_64_experts_have_64_colours_and_further_names_change_none():
    names = [f"expert_{i}" for i in range(64)]
    colours = expert_colours(names)
    assert len(set(colours.values())) == 65  # and base
    assert expert_colours([*names[:4], "base", "domain"]).items() >= {name: colours[name] for name in names[:4]}.items()
    assert expert_colours([*names, "base"])["base"] == expert_colours(["base"])["base"]


def test_contrast_is_that_of_wcag():
    assert contrast([0, 0, 0], "#ffffff") == pytest.approx(21)
    assert contrast([255, 255, 255], "#ffffff") == pytest.approx(1)
    assert contrast(channels("#777777"), "#ffffff") == pytest.approx(4.48, abs=0.005)  # the guideline's own example


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_colour_stands_out(theme):
    for colour in expert_colours(f"expert_{i}" for i in range(64)).values():
        assert contrast(channels(legible(colour, theme)), theme.background) >= theme.contrast
        assert contrast(channels(legible(colour, theme, 4.5)), theme.background) >= 4.5
    assert legible(theme.text, theme) == theme.text
