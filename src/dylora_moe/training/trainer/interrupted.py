"""How a training that a signal ended says so; light, because every start of the command line loads it."""

from __future__ import annotations

import signal


class Interrupted(Exception):
    """A signal ended the training after its current step, and a checkpoint was saved.

    Args:
        number: of the signal.
        remedy: how to go on.

    Attributes:
        number: of the signal.
        exit_code: 128 + the signal's number, as shells report it.
    """

    def __init__(self, number: int, remedy: str):
        self.number, self.exit_code = number, 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}; {remedy}")
