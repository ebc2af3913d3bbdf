"""Names short enough for a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def labels(names: Iterable[str], length: int = 22) -> dict[str, str]:
    """Name → what a figure shows for it, about `length` letters at most and different for different names.

    Long names lose what they all begin and end with, then their middle; a dollar starts no formula.
    """
    names = list(dict.fromkeys(names))
    long = [name for name in names if len(name) > length]
    start, end = (_common(long), _common([name[::-1] for name in long])) if len(long) > 1 else (0, 0)
    if start + end >= min(map(len, long), default=1):
        end = 0
    short: dict[str, str] = {}
    for i, name in enumerate(names):
        text = name
        if name in long:
            text = "…" * bool(start) + name[start : len(name) - end] + "…" * bool(end)
        if len(text) > length:
            text = f"{text[: length // 2]}…{text[-(length // 2 - 1) :]}"
        text = text.replace("$", r"\$")
        short[name] = f"{text} ({i + 1})" if text in short.values() else text
    return short


def _common(names: Sequence[str]) -> int:
    """How many letters all `names` begin with; 0 if it is not worth an ellipsis."""
    count = 0
    while all(name[count : count + 1] == names[0][count : count + 1] != "" for name in names):
        count += 1
    return count if count > 2 else 0
