"""Recomputation: keep the inputs of a function for backward and call it again there.

This is torch's own non-reentrant ``checkpoint`` (Chen et al. 2016, arXiv:1604.06174) with one
addition: a ``Pass`` tells the function whether it runs for the first or for the second time, so
that it can leave out results that are not read in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


class Pass:
    """Which run of a recomputed function this is.

    Attributes:
        is_second: this is the run in backward: only what autograd saves of it is read.
    """

    def __init__(self) -> None:
        self.is_second = False

    @contextmanager
    def second(self) -> Iterator[None]:
        """A context in which ``is_second`` holds."""
        self.is_second = True
        try:
            yield
        finally:
            self.is_second = False


def recomputed(
    function: Callable[..., Result],
    *args: object,
    which: Pass | None = None,
    hooks: AbstractContextManager[object] | None = None,
) -> Result:
    """Calls ``function(*args)``, keeps only the arguments, and calls it again in backward.

    Args:
        function: gives the same results both times.
        args: everything that differs between calls. It must not be captured instead: a captured
            name may refer to something else by then.
        which: is in its second run while the function is called again.
        hooks: a context that decides where the arguments are kept; by default where they are.
    """

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), which.second() if which else nullcontext()

    with hooks or nullcontext():
        return checkpoint(  # type: ignore[return-value]
            function, *args, use_reentrant=False, context_fn=contexts
        )
