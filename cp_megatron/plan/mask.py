"""Which key a query may attend to.

Every mask of this project gives query ``q`` one contiguous run of keys, ``first(q) .. last(q)``,
and both ends never go back as ``q`` grows. That is what makes planning cheap: the pairs of any
rectangle are a sum over rows, and the keys a chunk of queries needs are one run per document.

    causal               full                 documents([3, 2])
    q\\k 0 1 2 3 4       q\\k 0 1 2 3 4       q\\k 0 1 2 3 4
     0   x . . . .        0   x x x x x        0   x . . . .
     1   x x . . .        1   x x x x x        1   x x . . .
     2   x x x . .        2   x x x x x        2   x x x . .
     3   x x x x .        3   x x x x x        3   . . . x .
     4   x x x x x        4   x x x x x        4   . . . x x
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError

IntArray = npt.NDArray[np.int64]
Window = tuple[int, int]


@dataclass(frozen=True)
class Mask:
    """One mask for every row of a batch. Make it with ``causal``, ``full`` or ``documents``.

    Attributes:
        lengths: the documents' lengths in order; a single one when the row is not packed.
        is_causal: a query attends no later key.
        window: ``(left, right)``, both >= -1, -1 = unlimited: query q attends key k of its
            document iff ``q - left <= k <= q + right``. Causal masks have ``right == 0``.
        kind: the constructor's name, for people.
    """

    lengths: tuple[int, ...]
    is_causal: bool
    window: Window
    kind: Literal["causal", "full", "documents"]

    @classmethod
    def causal(cls, seq_len: int, window: Window | None = None) -> Mask:
        """One sequence; a query attends itself and what came before."""
        return cls._make([seq_len], True, window, "causal")

    @classmethod
    def full(cls, seq_len: int, window: Window | None = None) -> Mask:
        """One sequence; every query attends every key."""
        return cls._make([seq_len], False, window, "full")

    @classmethod
    def documents(
        cls, lengths: Sequence[int], causal: bool = True, window: Window | None = None
    ) -> Mask:
        """A packed row; attention never crosses from one document to another."""
        return cls._make(lengths, causal, window, "documents")

    @classmethod
    def _make(
        cls,
        lengths: Sequence[int],
        causal: bool,
        window: Window | None,
        kind: Literal["causal", "full", "documents"],
    ) -> Mask:
        array = np.asarray(lengths)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu" or array.min() < 1:
            raise ConfigError(
                "mask lengths", list(lengths), "must be positive integers, one or more"
            )
        return cls(tuple(array.tolist()), causal, cls._bounds(window, causal), kind)

    def within(self, window: Window | None) -> Mask:
        """The same documents under another window."""
        return replace(self, window=self._bounds(window, self.is_causal))

    @staticmethod
    def _bounds(window: Window | None, causal: bool) -> Window:
        """Both bounds as integers, -1 where there is none."""
        try:
            left, right = (-1, -1) if window is None else map(operator.index, window)
        except (TypeError, ValueError):
            rule = "must be two integers, -1 for unlimited"
            raise ConfigError("window", window, rule, "(left, right)") from None
        if left < -1 or right < -1:
            rule = "must be >= 0, or -1 for unlimited"
            raise ConfigError("window", window, rule, "(left, right)")
        return left, 0 if causal else right

    @cached_property
    def seq_len(self) -> int:
        """Positions in the row."""
        return sum(self.lengths)

    @property
    def has_window(self) -> bool:
        """Some pair inside a document is cut by the window itself."""
        left, right = self.window
        return left >= 0 or (right >= 0 and not self.is_causal)

    def starts(self) -> IntArray:
        """int64 [documents + 1]: where each document starts, and the end of the last."""
        return self._starts

    @cached_property
    def _starts(self) -> IntArray:
        starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)
        starts.setflags(write=False)
        return starts

    def document_positions(self) -> IntArray:
        """int64 [seq_len]: each position counted from the start of its document."""
        starts, lengths = self.starts()[:-1], np.asarray(self.lengths)
        return np.arange(self.seq_len, dtype=np.int64) - np.repeat(starts, lengths)

    def key_range(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """For queries ``q`` the first key attended and the one after the last, int64 alike."""
        starts = self.starts()
        document = np.searchsorted(starts, q, side="right") - 1
        first, end = starts[document], starts[document + 1]
        left, right = self.window
        if left >= 0:
            first = np.maximum(first, q - left)
        if right >= 0:
            end = np.minimum(end, q + right + 1)
        return first, end

    def pairs_between(self, q0: int, q1: int, k0: int, k1: int) -> int:
        """Attended pairs with ``q0 <= q < q1`` and ``k0 <= k < k1``."""
        first, end = self.key_range(np.arange(q0, q1, dtype=np.int64))
        return int(np.maximum(np.minimum(end, k1) - np.maximum(first, k0), 0).sum())

    def pairs(self) -> int:
        """Attended pairs in all."""
        return self.pairs_between(0, self.seq_len, 0, self.seq_len)

    def dense(self) -> npt.NDArray[np.bool_]:
        """bool [seq_len, seq_len], row = query: the mask spelt out from its definition.

        The oracle of everything above; it shares no code with it.
        """
        position = np.arange(self.seq_len)
        q, k = position[:, None], position[None, :]
        document = np.repeat(np.arange(len(self.lengths)), self.lengths)
        allowed = document[:, None] == document[None, :]
        left, right = self.window
        if self.is_causal:
            allowed &= k <= q
        if left >= 0:
            allowed &= k >= q - left
        if right >= 0:
            allowed &= k <= q + right
        return np.asarray(allowed, dtype=np.bool_)
