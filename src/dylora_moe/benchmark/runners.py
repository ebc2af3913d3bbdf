"""The variants of one run, ready to step."""

from __future__ import annotations

from .kinds import KINDS, SERVE, Kind
from .linear import linear_runner
from .models import Models, Unavailable
from .serve import serve_runner
from .settings import Settings
from .work import Runner, model_runner

PEER_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError)


def runners(settings: Settings, models: Models) -> tuple[list[Runner], dict[str, str]]:
    """The variants that run here, and why the others do not (key → reason)."""
    made, missing = [], {}
    for key in settings.kinds:
        kind = KINDS[key]
        for experts in settings.experts if kind.per_experts else (None,):
            name = key if experts is None else f"{key}/{experts}"
            if experts is not None and kind.sparse and settings.top_k >= experts:
                missing[name] = f"top-{settings.top_k} of {experts} is dense"
                continue
            try:
                runner = runner_of(settings, models, name, kind, experts)
                if kind.family == "xlora" or kind.form not in ("auto", "dense"):
                    with models.running(), runner.in_force():
                        runner.step()
                made.append(runner)
            except Unavailable as error:
                missing[name] = str(error)
            except PEER_ERRORS as error:
                if kind.family != "xlora":
                    raise
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return made, missing


def runner_of(settings: Settings, models: Models, key: str, kind: Kind, experts: int | None) -> Runner:
    """One variant, of a layer or of a model as the work wants it."""
    build = linear_runner if settings.work.startswith("linear") else model_runner
    if settings.work == SERVE:
        build = serve_runner
    return build(settings, models, key, kind, experts)
