"""How exactly two runs can agree on the processor at hand: in float64 throughout, or as a bare base agrees with itself.

A "float64" base still casts to float32 in its norms, rotary angles, softmax and loss, and so does our router; how that
rounds differs between processors, their instruction sets and the number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tiny import LAYERS, WIDTH

EXACT = 1e-12
"""Relative, where everything is float64: thousands of ulps, and a millionth of what one float32 in between costs."""


def ulps(terms: int) -> float:
    """Relative, for float32 sums of `terms` products in different orders: an ulp each, and 32 at the least."""
    return max(terms, 32) * torch.finfo(torch.float32).eps


FLOAT32 = ulps(2 * LAYERS * WIDTH)
"""Relative: for the sums on the way through a tiny base in float32, attention and feed-forward."""


needs_bfloat16 = pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="bfloat16 without vector instructions stops in torch itself on some processors",
)


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Within it what is cast to float32 is cast to float64, in transformers' code as in ours; also a decorator."""

    def widened(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            options = {key: torch.float64 if a is torch.float32 else a for key, a in options.items()}
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        for owner, name in ((Tensor, "to"), (F, "softmax"), (torch, "zeros")):
            patch.setattr(owner, name, widened(getattr(owner, name)))
        yield
