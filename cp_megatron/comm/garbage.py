"""When Python's garbage collector runs: not while modules are loaded, and not over all of torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pauses garbage collection, for the import of torch.

    Imports create hundreds of thousands of objects, which stay. Searching them for garbage again
    and again takes a fifth of the import's time, on cores that the ranks of a node share.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Excludes existing objects from garbage collection.

    Searching all of torch's takes a seventh of a second, in a step that all other ranks wait for.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
