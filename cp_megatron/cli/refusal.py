"""How a program ends on a ``ConfigError``: with a line for each mistake, and exit code 2."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator

from cp_megatron.errors import CombinedError, ConfigError, FinishedError

SECONDS_FOR_RANK_0 = 10.0
_LONGEST_VALUE = 200


def refuse(error: ConfigError, program: str, *, rank: int = 0) -> int:
    """Prints the error once, however many ranks have found it; returns exit code 2.

    The first rank to exit makes torchrun end the others by SIGTERM, so the other ranks wait until
    rank 0 has printed. A rank that is not ended in that time has found an error that rank 0 has
    not, and prints it.
    """
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    last = time.monotonic() + SECONDS_FOR_RANK_0
    while rank and not ended and time.monotonic() < last:
        time.sleep(0.02)
    if not rank or not ended:
        where = f" (rank {rank})" if rank else ""
        print("\n".join(_lines(error, f"{program}{where}")), file=sys.stderr, flush=True)
    return 2


def already_done(error: FinishedError, *, rank: int) -> int:
    """Says that a run that is started again has no steps left; returns exit code 0."""
    if not rank:
        print(f"nothing to do: {error}", flush=True)
    return 0


def _lines(error: ConfigError, program: str) -> Iterator[str]:
    """One line for each mistake, and their number if there are several."""
    errors = error.errors if isinstance(error, CombinedError) else (error,)
    yield from (error_line(each, program) for each in errors)
    if len(errors) > 1:
        yield f"{program}: {len(errors)} mistakes on this command line, one on each line above"


def error_line(error: ConfigError, program: str) -> str:
    """The error on one line, whatever characters its value contains."""
    value = str(error.value)
    shown = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."
    short = ConfigError(error.flag, shown, error.rule, error.works)
    return printable(f"{program}: error: {short}")


def printable(text: str) -> str:
    """The text with escapes in place of characters that a terminal cannot print."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
