"""`python -m dylora_moe` is `dylora-moe`; so is each rank that torchrun or `accelerate launch` starts."""

import os
import sys


def run() -> None:
    """Run the command line; a rank of several leaves by `leave_rank`."""
    try:
        from .cli import main
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in ("typer", "rich"):
            raise
        sys.exit(f"{module} is not installed; the command line needs pip install 'dylora-moe[train]'.")
    code: object = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from .training.trainer.distributed import leave_rank

        leave_rank(code)
    sys.exit(code)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    run()
