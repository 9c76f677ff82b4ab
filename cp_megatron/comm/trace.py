"""Names for the parts of a step in a profiler's trace; they cost nothing where none is recorded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

_OFF = nullcontext()


def traced(name: str) -> AbstractContextManager[object]:
    """A range in the trace, for a ``with`` statement.

    Outside a profile it is a question to torch and an empty context, well under a microsecond;
    ``record_function`` alone costs several, also where nobody records.
    """
    return record_function(name) if _profiler_enabled() else _OFF
