"""How a training that a signal ended says so; light, because every start of the command line loads it."""

from __future__ import annotations

import signal


class Interrupted(Exception):
    """A signal ended the training after its current step, and a checkpoint was saved.

    Attributes:
        exit_code: 128 + the signal's number, as shells report it.
    """

    def __init__(self, number: int, output: str):
        self.exit_code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name}; continue with --resume, or in Python with "
            f"train(resume_from_checkpoint=True) (checkpoints in {output})."
        )
