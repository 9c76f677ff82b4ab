"""Locks a folder for one writer, on one machine and among machines that share the folder.

The lock is a file in the folder that says who holds it. It appears by a hard link, which only one
of several processes can make, also on a network's file system, and is complete when it appears.

    the holder is            it lives as long as
    on this machine          its process exists (number and start time, so that a recycled number
                             is not mistaken for it)
    on another machine       it refreshes the time of the file, which it does every 20 seconds;
                             it counts as gone after three minutes

The lock of a holder that is gone is taken over. Meanwhile ``flock`` on the old file keeps others
away. Where a file system has no ``flock`` among machines, two of them could take over the same lock
at once; the one that was first finds out within a second, or at its next refreshment.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from cp_megatron.config.files.lock_holder import (
    GONE_SECONDS,
    LOCK_FILE,
    UNKNOWN,
    Holder,
    holder_in,
    start_of,
    this_machine,
)
from cp_megatron.errors import ConfigError

BEAT_SECONDS = 20.0
_PATIENCE = 5.0
"""How long a process tries while others take over the same lock, in seconds."""
_PAUSE = 1.0
"""How long two machines need to see that they have taken over the same lock, in seconds."""


def refuse_held(flag: str, folder: Path, *, waits: bool = False) -> None:
    """Refuses a folder that another process has locked; writes nothing.

    Args:
        waits: the lock will be waited for, as in ``FolderLock``.

    Raises:
        ConfigError: names the holder.
    """
    current = _read(folder / LOCK_FILE)
    if current is None or (waits and current[0].machine != this_machine()):
        return
    if not current[0].is_gone(time.time() - current[1]):
        raise current[0].refusal(flag, folder)


def is_lock(file: Path) -> bool:
    """Whether the file is a lock, which does not count as a content of its folder."""
    return file.name.startswith(LOCK_FILE)


class FolderLock:
    """The lock of one folder, held by this process from ``acquire`` to ``release``.

    Args:
        folder: it is created if it does not exist.
        flag: the flag that names the folder, for errors.
        launchers: ``parent_mark`` of the ranks of this run.
        again: a launcher has started the ranks again, so that a lock of ranks that it started
            before is this run's own.
        waits: wait until a holder on another machine is gone, unless it shows a sign of life. So a
            scheduler can start a run again elsewhere as soon as its machine has crashed.

    Attributes:
        note: what the lock does not achieve on this file system; empty on most.
    """

    def __init__(
        self,
        folder: Path,
        *,
        flag: str,
        launchers: Sequence[str] = (),
        again: bool = False,
        waits: bool = False,
    ) -> None:
        self.folder, self.note = folder, ""
        self._flag, self._again, self._waits = flag, again, waits
        self._silent: tuple[str, float] | None = None  # the lock that is waited for
        self._path = folder / LOCK_FILE
        self._me = Holder(
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            started=start_of(os.getpid()),
            since=f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
            launchers=tuple(sorted(set(launchers))),
            token=secrets.token_hex(8),
        )
        self._fd = -1
        self._made: list[Path] = []
        self._released = threading.Event()

    def acquire(self, *, new: bool = False) -> None:
        """Creates the folder if necessary, and takes the lock.

        Args:
            new: the folder must not exist.

        Raises:
            FileExistsError: ``new``, and the folder exists.
            ConfigError: another process holds the lock, or the folder cannot be written.
        """
        path = self.folder.absolute()
        missing = [x for x in (path, *path.parents) if not os.path.lexists(x)]
        try:
            self.folder.mkdir(parents=True, exist_ok=not new)
            self._made = missing
            self._take()
        except OSError as error:
            if new and isinstance(error, FileExistsError):
                raise
            self.release()
            rule = f"cannot be written: {error.strerror}"
            raise ConfigError(self._flag, self.folder, rule, "another folder") from None
        except BaseException:
            self.release()
            raise
        self._refresh()
        threading.Thread(target=self._beat, daemon=True, name="folder lock").start()

    def release(self) -> None:
        """Removes the lock, and folders that ``acquire`` created if they are empty."""
        self._released.set()
        if self._fd >= 0:
            with suppress(OSError):
                if self._is_ours():
                    self._path.unlink()
            os.close(self._fd)
            self._fd = -1
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _take(self) -> None:
        """Makes the lock, or raises the refusal of its living holder."""
        draft = self._path.with_name(f"{LOCK_FILE}.{self._me.token}")
        self._fd = self._write(draft)
        try:
            end, pause = time.monotonic() + _PATIENCE, 0.0
            while not (self._link(draft) and self._stays_ours(pause)):
                current = _read(self._path)
                if current is None:  # it was released, or taken over, a moment ago
                    time.sleep(0.01)
                elif self._may_take_over(*current):
                    pause = max(pause, self._remove(current[0]))
                elif self._may_wait(*current):
                    time.sleep(_PAUSE)
                    end = time.monotonic() + _PATIENCE
                else:
                    raise current[0].refusal(self._flag, self.folder)
                if time.monotonic() > end:
                    raise (current or (UNKNOWN,))[0].refusal(self._flag, self.folder)
        finally:
            with suppress(OSError):
                draft.unlink()

    def _write(self, path: Path) -> int:
        """Makes a file with this process as the holder, locks it and returns it open."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with os.fdopen(fd, "wb", closefd=False) as file:
                file.write(json.dumps(asdict(self._me)).encode())
        except OSError:  # such as a full disk
            os.close(fd)
            path.unlink()
            raise
        _flock(fd)
        return fd

    def _link(self, draft: Path) -> bool:
        """Names the draft as the lock; returns False if there is a lock."""
        try:
            os.link(draft, self._path)
        except FileExistsError:
            # A network's file system may repeat a request that has succeeded.
            return os.fstat(self._fd).st_nlink == 2
        except OSError:  # this file system has no hard links
            try:
                fd = self._write(self._path)
            except FileExistsError:
                return False
            os.close(self._fd)
            self._fd = fd
        return True

    def _stays_ours(self, pause: float) -> bool:
        """Whether the lock is still this process's after ``pause`` seconds."""
        time.sleep(pause)
        return self._is_ours()

    def _refresh(self) -> None:
        try:
            os.utime(self._fd)
        except OSError as error:
            self.note = (
                f"{self.folder}: its lock's time cannot be refreshed ({error.strerror}); a run on "
                f"another machine takes it for abandoned after {GONE_SECONDS / 60:.0f} minutes"
            )

    def _may_take_over(self, holder: Holder, refreshed: float) -> bool:
        """Whether the holder is gone, or is a rank that this run's launcher started before."""
        self._refresh()  # the age is measured by the clock that made both times
        silent = os.fstat(self._fd).st_mtime - refreshed
        earlier = self._again and bool(set(self._me.launchers) & set(holder.launchers))
        return earlier or holder.is_gone(silent)

    def _may_wait(self, holder: Holder, refreshed: float) -> bool:
        """Whether the holder may be gone: it is elsewhere, and silent since it was first seen."""
        if not self._waits or holder.machine == self._me.machine:
            return False
        if self._silent is None:
            self._silent = holder.token, refreshed
            _say(
                f"{self.folder} was held by process {holder.pid} on {holder.host} a moment ago; "
                f"waiting up to {GONE_SECONDS / 60:.0f} minutes for a sign of life"
            )
        return self._silent == (holder.token, refreshed)

    def _remove(self, holder: Holder) -> float:
        """Removes the lock of a holder that is gone, unless another process was faster.

        Returns:
            How many seconds later a process that was faster is sure to be seen.
        """
        try:
            # Another user's lock may be read-only; flock on a network may need to write.
            writes = os.access(self._path, os.W_OK)
            fd = os.open(self._path, os.O_RDWR if writes else os.O_RDONLY)
        except OSError:
            return 0.0
        try:
            # A machine that has crashed may keep its flock until it is started again.
            elsewhere = holder.machine not in ("", self._me.machine)
            is_judged = (_flock(fd) or elsewhere) and holder_in(os.read(fd, 2**20)) == holder
            if is_judged and _same_file(fd, self._path):
                self._path.unlink()
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)
        time.sleep(secrets.randbelow(20) / 1000)
        return 0.0 if holder.machine == self._me.machine else _PAUSE

    def _is_ours(self) -> bool:
        try:
            return _same_file(self._fd, self._path)
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        """Refreshes the lock's time, until the lock is released.

        Another run may have taken it over from a process that was stopped for minutes.
        """
        while not self._released.wait(BEAT_SECONDS):
            current = _read(self._path)
            if current is not None and current[0].token != self._me.token:
                _leave(current[0].refusal(self._flag, self.folder))
                return
            # The server of the files may be away for a while, or the folder has been moved.
            with suppress(OSError):
                os.utime(self._fd)


def _read(path: Path) -> tuple[Holder, float] | None:
    """The holder of a lock and when it last refreshed it, or None if there is no lock."""
    try:
        with path.open("rb") as file:
            refreshed, data = os.fstat(file.fileno()).st_mtime, file.read()
    except OSError:
        return (UNKNOWN, time.time()) if os.path.lexists(path) else None
    return holder_in(data), refreshed


def _flock(fd: int) -> bool:
    """Locks an open file; False if another process has locked it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no such locks
        return True
    return True


def _same_file(fd: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(fd), path.stat())


def _leave(error: ConfigError) -> None:
    """Ends this process, so that two runs never write into one folder."""
    _say(f"error: {error}")
    os._exit(2)


def _say(text: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
