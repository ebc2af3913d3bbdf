"""What the phases measure, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dylora_moe.mixing import kernels

EXPERTS, MANY, ACTIVE = 8, 64, 2
LARGE = {
    "hidden": 4096, "kv": 1024, "intermediate": 14336, "head": 128, "layers": 4, "vocabulary": 4096, "rank": 16,
    "prompt": 2048, "batch": 4, "length": 512, "rounds": 40, "calls": 20,
}  # fmt: skip
TINY = {
    "hidden": 64, "kv": 32, "intermediate": 96, "head": 16, "layers": 2, "vocabulary": 64, "rank": 4,
    "prompt": 24, "batch": 2, "length": 12, "rounds": 3, "calls": 2,
}  # fmt: skip


class Setting(NamedTuple):
    """What the phases measure, and on what.

    Attributes:
        sizes: `LARGE` or `TINY`.
        device: where everything is.
        dtype: of weights and inputs.
    """

    sizes: Mapping[str, int]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def here(cls, tiny: bool) -> Setting:
        """The GPU in bfloat16, or without one the CPU in float32."""
        gpu = torch.cuda.is_available()
        kind = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
        return cls(TINY if tiny else LARGE, torch.device(kind[0]), kind[1])

    @property
    def has_kernels(self) -> bool:
        """Whether the layers use our kernels here."""
        return kernels.available(torch.empty(1, device=self.device, dtype=self.dtype))

    def ids(self, batch: int, length: int) -> Tensor:
        """Random token ids."""
        return torch.randint(0, self.sizes["vocabulary"], (batch, length), device=self.device)
