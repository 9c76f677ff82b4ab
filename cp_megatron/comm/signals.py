"""Signals: the first one makes a program finish its step or row, write its results and stop."""

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
"""SLURM sends one of the last two as a warning; torchrun forwards them with --signals-to-handle."""


class StopRequest:
    """Whether this rank was asked to stop; a signal handler.

    A second signal changes nothing. Under torchrun, Ctrl-C reaches a rank twice, from the terminal
    and from torchrun, and the second one must not interrupt the save that the first one started.

    Args:
        quiet: print nothing (on all ranks but the first).
        then: what the program does now, for the user.
    """

    def __init__(
        self, *, quiet: bool = True, then: str = "finishing the step, then saving"
    ) -> None:
        self.signal: signal.Signals | None = None
        self._quiet, self._then = quiet, then

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            return
        self.signal = signal.Signals(number)
        if not self._quiet:
            # Not through Python's streams: the handler may have interrupted a write to one of them.
            text = f"\n{self.signal.name}: {self._then}\n"
            with suppress(OSError):
                os.write(2, text.encode())


def stop_at_once() -> None:
    """Makes Ctrl-C end this process at once, without a stack trace, as SIGTERM does.

    This is for the time before the training (minutes for a large model), when there is nothing to
    save. A Python handler would not run while the process waits for other ranks inside a library.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_with_launcher(launch: Launch) -> None:
    """Makes this process receive SIGTERM when its launcher dies, on Linux.

    Otherwise it would wait inside a library, for minutes, for ranks that will never start.
    """
    if not launch.under_torchrun:  # started from a shell, which may be closed
        return
    with suppress(OSError, AttributeError):  # no C library, or one without prctl
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() == 1:  # the launcher has died already
        os._exit(1)


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code, without shutting down the interpreter.

    On a busy machine, a process that used gloo sometimes aborts while Python shuts down ("terminate
    called without an active exception"), probably because a thread of gloo releases its last tensor
    only then. A run that is finished and saved would count as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def stop_on_signal(
    *, quiet: bool = True, then: str = "finishing the step, then saving"
) -> Iterator[StopRequest]:
    """Catches the signals inside the block, and ignores them after it.

    The arguments are those of ``StopRequest``.

    After the block the process only exits. Its launcher may still forward the signal that stopped
    it, or end it because another rank exited a moment earlier.
    """
    request = StopRequest(quiet=quiet, then=then)
    for number in CAUGHT:
        signal.signal(number, request)
    try:
        yield request
    finally:
        for number in CAUGHT:
            signal.signal(number, signal.SIG_IGN)
