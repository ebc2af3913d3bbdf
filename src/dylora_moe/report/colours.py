"""Colours of figures and pages: light and dark, one colour per expert, legible for colour-blind readers."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BASE = "base"
# Eight of the ten colours of Petroff (arXiv:2107.02270), chosen there for colour-blind readers; the two greys are out
# because grey is the base.
PALETTE = ("#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#92dadd")


@dataclass(frozen=True)
class Theme:
    """The colours of a page.

    Attributes:
        background, text, muted, grid: of the page, its text, its secondary text and the thin lines.
        heat: the heat maps' colours from nothing to all.
        contrast: how far a line or dot must stand out from the background, as WCAG's ratio.
    """

    background: str
    text: str
    muted: str
    grid: str
    heat: tuple[str, ...]
    contrast: float


LIGHT = Theme("#ffffff", "#1c2127", "#626b76", "#dde2e8", ("#f4f7fb", "#a9cbe8", "#3f86c2", "#0b3c68"), 1.8)
DARK = Theme("#161b22", "#e6eaef", "#98a2ae", "#323a44", ("#1d242d", "#1f4f7d", "#3f90da", "#d3e9fb"), 3.5)


def expert_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name by its position: eight hues, then the same darker, lighter and so on; `base` is grey."""
    shades = (0.0, -0.35, 0.4, -0.6, 0.65, -0.18, 0.2, -0.48)
    colours = {}
    for i, name in enumerate(name for name in dict.fromkeys(names) if name != BASE):
        red, green, blue = (int(PALETTE[i % 8][j : j + 2], 16) / 255 for j in (1, 3, 5))
        hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
        shade = shades[i // 8 % len(shades)]
        light += shade * (1 - light if shade > 0 else light)
        colours[name] = "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue, light, saturation))
    return {**colours, BASE: "#8b949e"}


def legible(colour: str, theme: Theme, least: float | None = None) -> str:
    """`colour`, shifted towards the text's until its contrast with the background is `least` (the theme's own)."""
    mixed, text = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (colour, theme.text))
    while contrast(mixed, theme.background) < (least or theme.contrast) and mixed != text:
        mixed = [round(0.8 * a + 0.2 * b) if abs(a - b) > 2 else b for a, b in zip(mixed, text, strict=True)]
    return "#" + "".join(f"{c:02x}" for c in mixed)


def contrast(colour: Sequence[int], background: str) -> float:
    """The contrast ratio of WCAG 2.1."""

    def luminance(channels: Sequence[int]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(colour), luminance([int(background[i : i + 2], 16) for i in (1, 3, 5)])))
    return (high + 0.05) / (low + 0.05)
