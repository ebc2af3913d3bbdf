"""Which part of an expert's matrices a rank of tensor parallelism holds; plain numbers, after vLLM's own rules.

One linear of vLLM computes one or several parts side by side: q, k and v, or gate and up. Each is a matrix of its own
in the Hugging Face model, or all are one there (`fused`). Shapes: D in, O out of all parts, R rows of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """How a linear is cut.

    Attributes:
        inputs: D, in full.
        parts: outputs of each part, in full.
        replicas: how many ranks hold the same outputs, per part: more than 1 where k/v heads are fewer than ranks.
        rank: of tensor parallelism.
        size: of tensor parallelism.
        cut: `"inputs"` (row parallel), `"outputs"` (column parallel) or `"nothing"`.
    """

    inputs: int
    parts: tuple[int, ...]
    replicas: tuple[int, ...]
    rank: int = 0
    size: int = 1
    cut: str = "nothing"

    @property
    def own_inputs(self) -> slice:
        """The columns of an A, and of a weight, that this rank reads."""
        if self.cut != "inputs":
            return slice(0, self.inputs)
        width = self.inputs // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def outputs_of(self, part: int) -> slice:
        """Where a part stands in this rank's output."""
        before = sum(self._width(other) for other in range(part))
        return slice(before, before + self._width(part))

    def rows_of(self, part: int) -> slice:
        """The rows of a part's own matrix that this rank computes."""
        if self.cut != "outputs":
            return slice(0, self.parts[part])
        at = self.rank // self.replicas[part]
        return slice(at * self._width(part), (at + 1) * self._width(part))

    def fused_rows(self) -> list[int]:
        """The same for one matrix of all parts: its row for every output of this rank."""
        found: list[int] = []
        for part in range(len(self.parts)):
            before = sum(self.parts[:part])
            own = self.rows_of(part)
            found += range(before + own.start, before + own.stop)
        return found

    def _width(self, part: int) -> int:
        if self.cut != "outputs":
            return self.parts[part]
        return self.parts[part] * self.replicas[part] // self.size
