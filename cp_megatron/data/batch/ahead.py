"""The next step's rows and plans are made while this step computes. No torch.

    caller      | step 0        | step 1        | step 2        |
    thread      | makes 1       | makes 2       | makes 3       |

A row of a thousand documents takes tens of milliseconds to plan; they would lie between steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """An iterator over what another iterator gives, which is run one item ahead in one thread.

    The items and their order are those of the other iterator; an error that it raises is raised
    here, where the item would have come. A context manager: when it is left, the item in the making
    is waited for and no thread remains.

    Args:
        items: run in the thread only; it must not touch what the caller changes meanwhile.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._next = self._begin()

    def __enter__(self) -> Ahead[Item]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Ahead[Item]:
        return self

    def __next__(self) -> Item:
        found = self._next.result()
        if not found:
            raise StopIteration
        self._next = self._begin()
        return found[0]

    def _begin(self) -> Future[tuple[Item, ...]]:
        return self._thread.submit(self._take)

    def _take(self) -> tuple[Item, ...]:
        """The next item, or nothing at the end."""
        for item in self._items:
            return (item,)
        return ()
