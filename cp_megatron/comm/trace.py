"""Names for the parts of a step: in a profiler's trace, and in the errors of a wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

AWAITED = "waiting for "
"""How the note of an error begins that says what was waited for."""
_OFF = nullcontext()


def traced(name: str) -> AbstractContextManager[object]:
    """A named range in the trace, for a ``with`` statement.

    Without a profiler it costs well under a microsecond: one question to torch and an empty
    context. ``record_function`` alone would cost several microseconds.
    """
    return record_function(name) if _profiler_enabled() else _OFF


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """A wait for another rank, named in the trace, and in a note of an error that ends it.

    torch records collectives, but of messages from rank to rank only those of NCCL, so that after a
    timeout nothing else may say what a rank waited for.
    """
    try:
        with traced(f"wait for {what}"):
            yield
    except RuntimeError as error:
        error.add_note(f"{AWAITED}{what}")
        raise
