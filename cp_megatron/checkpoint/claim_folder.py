"""Claims the folder that a program writes into, for all of its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cp_megatron.checkpoint.object_collectives import Group, all_gather_objects, on_first_rank
from cp_megatron.config.files.folder_lock import FolderLock
from cp_megatron.config.files.lock_holder import parent_mark

Choice = tuple[Path, bool]
"""A folder, and whether it must be new."""


@contextmanager
def claimed_folder(
    choose: Callable[[], Choice],
    check: Callable[[], None],
    *,
    flag: str,
    again: bool,
    waits: bool = False,
    group: Group,
) -> Iterator[tuple[Path, str]]:
    """Locks a folder while the block runs. Every rank calls this; the first one holds the lock.

    A folder that is created for this and stays empty is removed after the block.

    Args:
        choose: returns the folder. It is called again if a folder that must be new has just been
            created by another program.
        check: raises ConfigError if the content of the folder, which is locked now, is not as
            expected.
        flag: the flag that names the folder.
        again: a launcher has started the ranks again, so that its earlier ranks are this run.
        waits: wait for a holder elsewhere that may be gone, as in ``FolderLock``.
        group: the ranks; None means all of them.

    Yields:
        The folder, which exists, and a note about its file system; empty on most.

    Raises:
        ConfigError: the folder is in use, cannot be written, or fails the check; on every rank.
    """
    launchers = all_gather_objects(parent_mark(), group)
    held: list[FolderLock] = []

    def take() -> tuple[Path, str]:
        while True:
            folder, is_new = choose()
            lock = FolderLock(folder, flag=flag, launchers=launchers, again=again, waits=waits)
            try:
                lock.acquire(new=is_new)
            except FileExistsError:
                continue
            held.append(lock)
            check()
            return folder, lock.note

    try:
        yield on_first_rank(take, group)
    finally:
        for lock in held:
            lock.release()
