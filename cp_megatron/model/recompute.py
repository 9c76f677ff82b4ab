"""Recomputation: keep a function's inputs for backward and call it again there.

Chen et al. 2016, arXiv:1604.06174, as torch's own non-reentrant ``checkpoint`` does it. What is new
here is a ``Pass``: the function is told whether it runs for the first time or again, so that what
nobody reads is not computed at all.
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
        again: this is the second one, in backward: only what autograd saves of it is read.
    """

    def __init__(self) -> None:
        self.again = False

    @contextmanager
    def second(self) -> Iterator[None]:
        """Inside, ``again`` holds."""
        self.again = True
        try:
            yield
        finally:
            self.again = False


def recomputed(
    function: Callable[..., Result],
    *args: object,
    hooks: AbstractContextManager[object] | None = None,
) -> Result:
    """Call ``function(pass, *args)``, keep its inputs alone for backward, call it again there.

    Args:
        function: gives the same results both times.
        args: never captured by it: a captured name may mean something else by then.
        hooks: a context that says where the inputs are kept; by default where they are.
    """
    which = Pass()

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), which.second()

    with hooks or nullcontext():
        return checkpoint(  # type: ignore[return-value]
            function, which, *args, use_reentrant=False, context_fn=contexts
        )
