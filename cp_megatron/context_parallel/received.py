"""What an operation received, for layers that are recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Received:
    """What an operation received from other ranks, kept for a second call that sends nothing.

    A recomputed layer passes the same object twice. Unlike ``KeptAttention`` it holds no results:
    the second call computes again, and what is kept does not grow with the tokens.
    """

    def __init__(self) -> None:
        self._tensors: tuple[Tensor | None, ...] | None = None

    @property
    def filled(self) -> bool:
        """Whether the first call was made."""
        return self._tensors is not None

    def once(self, receive: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Returns what ``receive`` returned the first time; it is not called again."""
        if self._tensors is None:
            self._tensors = receive()
        return self._tensors
