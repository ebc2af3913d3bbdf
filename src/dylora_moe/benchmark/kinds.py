"""The variants that a run can compare, as a table."""

from __future__ import annotations

from dataclasses import dataclass

MODEL_WORKS = ("train", "prefill", "decode")
SERVE = "serve"
LINEAR_WORKS = ("linear", "linear-train", "linear-token")
TIMED_ALONE = (*MODEL_WORKS, *LINEAR_WORKS)
WORKS = (*TIMED_ALONE, SERVE)
FORWARD_WORKS = tuple(work for work in TIMED_ALONE if work != "decode")
DROPOUT = 0.1


@dataclass(frozen=True)
class Kind:
    """One way to do the work.

    Attributes:
        title: for tables; `{r}`, `{R}` = r·E, `{E}` and `{k}` are filled in.
        family: `base`, `peft`, `passes`, `xlora`, `ours` or `engine`: how it is built.
        works: where it takes part.
        form: of the mixture, see `MoELoraConfig.mixing_form`.
        sparse: top-k weights instead of dense ones.
        granularity: of the routing.
        forced: one expert for all rows.
        by_row: each row forced to an expert, neighbours to different ones.
        bare: no expert for any row.
        http: through a server.
        fold: the fixed mixture is folded for the length of a generation.
        dropout: of the adapters.
        same_dtype: PEFT's adapter in the base's dtype (`autocast_adapter_dtype=False`) instead of float32.
        wide: PEFT's adapter of rank r·E.
    """

    title: str
    family: str
    works: tuple[str, ...] = TIMED_ALONE
    form: str = "auto"
    sparse: bool = False
    granularity: str = "token"
    forced: bool = False
    by_row: bool = False
    bare: bool = False
    http: bool = False
    fold: bool = False
    dropout: float = 0.0
    same_dtype: bool = False
    wide: bool = False

    @property
    def per_experts(self) -> bool:
        """Whether it differs with E."""
        return self.family not in ("base", "peft") or self.wide


KINDS = {
    "base": Kind("bare base", "base", WORKS),
    "base-again": Kind("bare base, again", "base", WORKS),
    "peft": Kind("PEFT, one adapter r={r}", "peft"),
    "peft-same-dtype": Kind("PEFT, one adapter r={r} in the base's dtype", "peft", same_dtype=True),
    "peft-wide": Kind("PEFT, one adapter r={R}", "peft", wide=True),
    "loop": Kind("reference loop", "ours", form="reference"),
    "loop-top": Kind("reference loop, top-{k}", "ours", form="reference", sparse=True),
    "passes": Kind("one pass per expert", "passes", MODEL_WORKS),
    "xlora": Kind("PEFT X-LoRA", "xlora", MODEL_WORKS),
    "dense": Kind("ours, dense form", "ours", form="dense"),
    "auto": Kind("ours", "ours"),
    "auto-dropout": Kind(f"ours, dropout {DROPOUT}", "ours", ("train", "linear-train"), dropout=DROPOUT),
    "by-row": Kind("ours, each row its own expert", "ours", ("train", "prefill"), by_row=True),
    "by-row-dense": Kind(
        "ours, each row its own expert, dense form", "ours", ("train", "prefill"), form="dense", by_row=True
    ),
    "dense-top": Kind("ours, dense form, top-{k}", "ours", form="dense", sparse=True),
    "grouped-top": Kind("ours, grouped form, top-{k}", "ours", FORWARD_WORKS, form="grouped", sparse=True),
    "gathered-top": Kind("ours, gathered form, top-{k}", "ours", form="gathered", sparse=True),
    "auto-top": Kind("ours, top-{k}", "ours", sparse=True),
    "prefix": Kind("ours, per prefix, top-{k}", "ours", ("decode",), sparse=True, granularity="prefix"),
    "sequence": Kind("ours, per sequence, top-{k}", "ours", ("decode",), sparse=True, granularity="sequence"),
    "sequence-fold": Kind(
        "ours, per sequence, top-{k}, folded", "ours", ("decode",), sparse=True, granularity="sequence", fold=True
    ),
    "forced": Kind("ours, one expert forced", "ours", ("decode",), forced=True),
    "engine-base": Kind("engine, bare base", "engine", (SERVE,), bare=True),
    "engine": Kind("engine, routed, top-{k}", "engine", (SERVE,), sparse=True),
    "engine-prefix": Kind("engine, routed per prefix, top-{k}", "engine", (SERVE,), sparse=True, granularity="prefix"),
    "engine-forced": Kind("engine, one expert", "engine", (SERVE,), forced=True),
    "engine-each": Kind("engine, each request its own expert", "engine", (SERVE,), by_row=True),
    "http-base": Kind("server, bare base", "engine", (SERVE,), bare=True, http=True),
    "http": Kind("server, routed, top-{k}", "engine", (SERVE,), sparse=True, http=True),
    "forced-fold": Kind("ours, one expert forced, folded", "ours", ("decode",), forced=True, fold=True),
}
