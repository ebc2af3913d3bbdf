"""What a command says when it fails: one message that names the remedy; the traceback only where it is asked for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from .training.trainer.interrupted import Interrupted

EXTRAS = {
    "train": ("trl", "accelerate", "datasets", "gguf", "yaml", "psutil", "tensorboard"),
    "plot": ("matplotlib", "PIL", "jinja2"),
    "serve": ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "openai", "httpx2"),
    "eval": ("lm_eval",),
}
"""Extra → the modules that come with it and that a core installation may lack."""

_LOG = logging.getLogger("dylora_moe")


def _be_verbose(asked: bool) -> None:
    if asked:
        _LOG.setLevel(logging.DEBUG)


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        callback=_be_verbose,
        is_eager=True,
        expose_value=False,
        help="Say more, and show the traceback of an error.",
    ),
]
"""The option that every command has."""


def missing_extra(error: BaseException | None) -> str | None:
    """What to install if `error` or what caused it is a missing module that an extra brings; None if it is not.

    Libraries that load lazily raise a `RuntimeError` of their own from it.
    """
    while error is not None:
        if isinstance(error, ImportError):
            module = (error.name or "").partition(".")[0]
            for extra, modules in EXTRAS.items():
                if module in modules:
                    return f"{module} is not installed; pip install 'dylora-moe[{extra}]'."
        error = error.__cause__
    return None


@contextmanager
def one_message(errors: Console) -> Iterator[None]:
    """Within the block an error that a user can mend is one message on `errors` and the exit code 2.

    With `--verbose` it is raised, for its traceback.
    """
    try:
        yield
    except Interrupted as stopped:
        errors.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
        sys.exit(stopped.exit_code)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        remedy = None if "dylora-moe[" in str(error) else missing_extra(error)
        if _LOG.isEnabledFor(logging.DEBUG) or (isinstance(error, RuntimeError) and remedy is None):
            raise
        errors.print(f"[bold red]{'ImportError' if remedy else type(error).__name__}[/]", end=": ")
        errors.print(remedy or str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
