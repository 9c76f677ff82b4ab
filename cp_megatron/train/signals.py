"""Stopping in good order: a signal asks, the step in progress is finished and saved. No torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from cp_megatron.comm.runtime import Launch

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM warns with one of the last two; torchrun passes them on with --signals-to-handle."""

_STDERR = 2
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether someone asked this rank to stop.

    A second signal changes nothing: under torchrun a Ctrl-C reaches a rank twice, from the
    terminal and from torchrun, and must not tear the save that the first one began.

    Args:
        quiet: say nothing (on all ranks but the first).
    """

    def __init__(self, *, quiet: bool = True) -> None:
        self.signal: signal.Signals | None = None
        self._quiet = quiet

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signal is not None:
            return
        self.signal = signal.Signals(number)
        if not self._quiet:
            # Past Python's streams: the handler may have interrupted one of their writes.
            with suppress(OSError):
                os.write(
                    _STDERR, f"\n{self.signal.name}: finishing the step, then saving\n".encode()
                )


def stop_at_once() -> None:
    """Lets Ctrl-C end this process like SIGTERM does: at once, without a stack trace.

    For the time before the training, minutes for a large model, when there is nothing to save. A
    Python handler would not run there while the process waits for its peers inside a library.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_with_launcher(launch: Launch) -> None:
    """Has a launcher's rank get SIGTERM when the launcher dies, on Linux.

    It would else wait inside a library, for minutes, for a peer that nobody will start any more.
    """
    if not launch.under_torchrun:  # who started it by hand may log out
        return
    with suppress(OSError, AttributeError):  # no C library, or one without prctl
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:  # it died before
        os._exit(1)


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code, without taking the interpreter down first.

    On a busy machine a process that talked over gloo sometimes aborts while Python ends ("terminate
    called without an active exception"): probably a thread of gloo that only then lets go of its
    last tensor. A run that was finished and saved would count as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def stop_on_signal(*, quiet: bool = True) -> Iterator[StopRequest]:
    """Catches the signals inside the block, and ignores them after it.

    After it the process only leaves, and its launcher may still pass on the signal that ended it,
    or end it for another rank that left a moment before.
    """
    request = StopRequest(quiet=quiet)
    for number in CAUGHT:
        signal.signal(number, request)
    try:
        yield request
    finally:
        for number in CAUGHT:
            signal.signal(number, signal.SIG_IGN)
