"""Makes the rows and the plan of the next step while this step computes.

    caller      | step 0        | step 1        | step 2        |
    thread      | makes 1       | makes 2       | makes 3       |

Planning a row of a thousand documents takes tens of milliseconds, which would delay every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(AbstractContextManager["Ahead[Item]"], Generic[Item]):
    """Runs an iterator one item ahead, in one thread.

    The items and their order are those of the iterator. An error that it raises is raised here, in
    place of the item. Leaving the context waits for the item in progress and ends the thread.

    Args:
        items: used by the thread only; it must not touch what the caller changes meanwhile.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._next = self._begin()

    def __exit__(self, *raised: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Ahead[Item]:
        return self

    def __next__(self) -> Item:
        taken = self._next.result()
        if not taken:
            raise StopIteration
        self._next = self._begin()
        return taken[0]

    def _begin(self) -> Future[tuple[Item, ...]]:
        """Takes the next item, or none at the end."""
        return self._thread.submit(lambda: tuple(islice(self._items, 1)))
