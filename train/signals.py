"""Signals that ask a run to save and stop.

SIGTERM, Ctrl-C   save after this step and exit with 0
SIGUSR2           the same, and ask for another start: exit with 75
Ctrl-C twice      stop at once

SIGUSR2 would end a rank that is still starting, as it ends every program that does not know it. minigpt-train and the
Slurm script start theirs with SIGUSR2 ignored, and wait for them to listen, or send it again.
"""

from __future__ import annotations

import atexit
import os
import signal

REQUEUE = os.EX_TEMPFAIL  # 75, from sysexits.h: failed for now, try again later


class StopRequest:
    """What the signals asked this rank for so far; the ranks agree by summing both over all of them.

    Attributes:
        requested: to save and stop.
        requeue: to be started again after that.
    """

    def __init__(self) -> None:
        self.requested = self.requeue = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._handle)
        # It may come again while Python ends, which takes the handlers away before it is done.
        atexit.register(signal.signal, signal.SIGUSR2, signal.SIG_IGN)

    def _handle(self, number: int, frame: object) -> None:
        self.requested = True
        self.requeue |= number == signal.SIGUSR2
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_status(requeue: bool) -> int:
    """Status of a rank that saved and stopped as it was asked to.

    Under torchrun it is 0 in any case: torchrun takes another status for a failure, starts the ranks again where it may
    (`--max-restarts`), and itself exits with 1. Whoever sent SIGUSR2 there knows that it did.
    """
    return REQUEUE if requeue and "TORCHELASTIC_RUN_ID" not in os.environ else 0
