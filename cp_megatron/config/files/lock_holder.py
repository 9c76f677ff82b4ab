"""Who holds the lock of a folder, and whether that process still exists."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cp_megatron.errors import ConfigError

LOCK_FILE = "lock.json"
"""The lock's name; a lock that is being written has a longer name that begins in the same way."""
GONE_SECONDS = 180.0
"""More than the minute for which a client of NFS may show an old time."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: the name of its machine, for people.
        machine: identifies its machine, the machine's last start, and the name space of its process
            number.
        pid: its process number.
        started: when the process was started, in the units of ``/proc``.
        since: when it took the lock, for people.
        launchers: marks of the processes that started the ranks of its run.
        token: a random word that no other holder has.
    """

    host: str
    machine: str
    pid: int
    started: int
    since: str
    launchers: tuple[str, ...]
    token: str

    def is_gone(self, silent: float) -> bool:
        """Whether it has ended, if its last sign of life is ``silent`` seconds old."""
        if self.machine == this_machine():
            return start_of(self.pid) != self.started
        return silent > GONE_SECONDS

    def refusal(self, flag: str, folder: Path) -> ConfigError:
        """The error of another run that wants to write into the folder."""
        if self == UNKNOWN:
            rule = "its lock does not say which process writes into this folder"
            works = f"another folder; if no process does, remove {folder / LOCK_FILE}"
            return ConfigError(flag, folder, rule, works)
        rule = f"process {self.pid} on {self.host} writes into this folder since {self.since}"
        works = "wait until it ends, or another folder"
        if self.machine != this_machine():
            works += f"; if that process is gone, wait {GONE_SECONDS / 60:.0f} minutes"
        return ConfigError(flag, folder, rule, works)


UNKNOWN = Holder(host="", machine="", pid=0, started=0, since="", launchers=(), token="")


def holder_in(data: bytes) -> Holder:
    """The holder that a lock names; ``UNKNOWN`` if it is unreadable."""
    try:
        words = json.loads(data)
        return Holder(**{**words, "launchers": tuple(words["launchers"])})
    except (ValueError, TypeError, KeyError):  # it is being written, or was damaged
        return UNKNOWN


def parent_mark() -> str:
    """A word for the process that started this one; no other process has the same word."""
    parent = os.getppid()
    text = f"{this_machine()} {parent} {start_of(parent)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def this_machine() -> str:
    """A word for this machine since its last start and for its space of process numbers."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def start_of(pid: int) -> int:
    """When a process of this machine was started, in clock ticks; 0 if it is gone.

    Without ``/proc`` it is 1 for every process that exists.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return 0
        except OSError:
            pass
        return 1
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if words[0] in "ZX" else int(words[19])
