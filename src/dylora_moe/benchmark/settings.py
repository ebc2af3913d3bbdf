"""What one run of the benchmark measures: the work, the shapes, the variants."""

from __future__ import annotations

import shlex
import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any

from .kinds import KINDS, WORKS

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Shape:
    """A Llama from scratch with random weights.

    Attributes:
        width, intermediate, layers, heads, kv_heads, vocabulary: as in `LlamaConfig`.
        whole_loss: False where the model stands for a few layers of a larger one: the loss then looks at one position
            only, so that neither the head nor the logits weigh in.
    """

    width: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 4096
    whole_loss: bool = True


SHAPES = {
    "tiny": Shape(64, 96, 2, 4, 2, 256),
    "small": Shape(576, 1536, 12, 9, 3),
    "medium": Shape(1024, 2816, 8, 16, 4),
    "8b-layer": Shape(4096, 14336, 1, 32, 8, 1024, whole_loss=False),
}
SMOLLM2 = "smollm2"  # the embedded base, with its weights


@dataclass(frozen=True)
class Settings:
    """One run: every variant below takes part in every round.

    Attributes:
        work: `train`, `prefill`, `decode`, `serve` (requests answered together), or one linear layer: `linear`,
            `linear-train`, `linear-token`.
        shape: a key of `SHAPES`, or `smollm2`.
        experts: the numbers of experts E, all in the same run.
        variants: keys of `KINDS`; None for all that the work has.
        batch, length: B and S of the input; requests, and the prompt's length, when decoding or serving.
        new_tokens: generated per row when decoding or serving.
        rank: of one expert.
        top_k: experts per token of the sparse variants.
        layers: decoder layers, if not the shape's own.
        router_layer: the router reads the input of this decoder layer; adapters, PEFT's too, sit on it and all above.
        rounds: timed rounds; 0 counts without timing.
        warmup: rounds before them.
        repeats: calls per timing; 0 chooses for a single linear layer and is 1 for a model.
        dtype, device, seed, threads: as in torch; 0 threads leave torch's choice.
        fake: count on tensors without storage, at shapes that would not fit or take minutes; needs `rounds=0`.
        graphs: also count graph breaks with `torch._dynamo.explain`.
        plan: the acceptance plan that these settings are, if any.
    """

    work: str = "train"
    shape: str = "small"
    experts: tuple[int, ...] = (8,)
    variants: tuple[str, ...] | None = None
    batch: int = 4
    length: int = 128
    new_tokens: int = 32
    rank: int = 16
    top_k: int = 2
    layers: int | None = None
    router_layer: int = 0
    rounds: int = 11
    warmup: int = 2
    repeats: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    threads: int = 0
    fake: bool = False
    graphs: bool = False
    plan: str | None = None

    def __post_init__(self):
        _choose("work", self.work, WORKS)
        _choose("shape", self.shape, (*SHAPES, SMOLLM2))
        _choose("dtype", self.dtype, DTYPES)
        for key in self.variants or ():
            _choose("variants", key, KINDS)
            if self.work not in KINDS[key].works:
                here = ", ".join(k for k, kind in KINDS.items() if self.work in kind.works)
                raise ValueError(f"variants={key!r}: not part of the work {self.work!r}, which has {here}.")
        if self.variants is not None and not self.variants:
            raise ValueError(f"variants='': name some of {', '.join(KINDS)}, or leave the option out for all.")
        if len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts={list(self.experts)}: name each number of experts once.")
        if not self.experts or min(self.experts) < 1:
            raise ValueError(
                f"experts={list(self.experts)}: numbers of experts from 1 upwards are needed, e.g. 1,8,64."
            )
        for key in ("batch", "length", "new_tokens", "rank", "top_k"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: a number from 1 upwards is needed.")
        for key in ("rounds", "warmup", "repeats", "threads", "router_layer"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: a number from 0 upwards is needed.")
        if self.shape == SMOLLM2 and (self.layers or self.fake or self.work.startswith("linear")):
            raise ValueError("shape='smollm2' has its own layers and weights; choose another shape to change them.")
        if self.fake and (self.rounds or self.work == "decode"):
            raise ValueError("fake tensors can be counted, not timed, and not decoded: fake needs rounds=0.")
        if self.fake and {"xlora", "auto-dropout"} & set(self.variants or ()):
            raise ValueError("xlora reads files and auto-dropout a seed, which fake tensors have not; leave them out.")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers={self.layers}: a number from 1 upwards is needed.")

    @property
    def kinds(self) -> list[str]:
        """Keys of the variants that take part."""
        here = [key for key, kind in KINDS.items() if self.work in kind.works]
        if self.variants:
            return [key for key in here if key in self.variants]
        pointless = {"peft-same-dtype": self.dtype == "float32", "xlora": self.fake, "auto-dropout": self.fake}
        return [key for key in here if not pointless.get(key)]

    @property
    def keys(self) -> list[str]:
        """Keys of the rows of the results: the variants, with `/E` where each number of experts has its own."""
        sizes = {True: [f"/{count}" for count in self.experts], False: [""]}
        return [key + size for key in self.kinds for size in sizes[KINDS[key].per_experts]]

    @property
    def name(self) -> str:
        """A file name for the results: the plan's, else work, shape and what differs from the defaults.

        Rounds and warm-up do not count, except that a run without rounds is not one with; variants do as a checksum.
        """
        if self.plan:
            return self.plan
        parts = [self.work, self.shape, "e" + "-".join(map(str, self.experts)), f"{self.batch}x{self.length}"]
        numbers = ("rank", "layers", "new_tokens", "top_k", "router_layer", "repeats", "seed", "threads")
        parts += [f"{key}{getattr(self, key)}" for key in numbers if getattr(self, key) != DEFAULTS[key]]
        parts += [str(getattr(self, key)) for key in ("dtype", "device") if getattr(self, key) != DEFAULTS[key]]
        parts += [
            word for word, used in (("counted", not self.rounds), ("fake", self.fake), ("graphs", self.graphs)) if used
        ]
        parts += [f"{zlib.crc32(','.join(self.kinds).encode()):08x}"] if self.variants else []
        return "-".join(parts).replace("_", "-").replace(":", "-")

    def command(self) -> str:
        """The command line that repeats this run."""
        words = ["dylora-moe", "bench"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "plan" or value == DEFAULTS[field.name]:
                continue
            option = "--" + field.name.replace("_", "-")
            if value is True:
                words.append(option)
            else:
                words += [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)

    def to_dict(self) -> dict:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Settings:
        """The inverse of `to_dict`, after JSON."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)


def _choose(key: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r}: choose one of {', '.join(choices)}.")


DEFAULTS = {field.name: field.default for field in fields(Settings)}
