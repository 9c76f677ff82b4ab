"""Two hosts on one machine: Linux network namespaces, joined by a link whose rate ``tc`` sets.

Needs root, ``ip`` and ``tc``, and the kernel's veth devices and token bucket filter.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import TracebackType

from harness.teams import Place

CLONE_NEWNET = 0x40000000
NAMES = ("a", "b")
LINK = "link0"  # the name of the device in both
MBIT = 1e6  # bits per second
LONGEST_BURST = 0.002  # seconds at the link's rate that a pause saves up, which then pass at once
LEAST_BURST = 64 << 10  # bytes: the largest packet


class MissingError(Exception):
    """The machine lacks something that two hosts need."""


def why_not() -> str | None:
    """What this machine lacks; None if it can have two hosts."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found (package iproute2)" if missing else None


class TwoHosts:
    """Two namespaces with a link between them, for a ``with`` statement.

    Raises:
        MissingError: the kernel refuses a namespace, a link or a rate.
    """

    def __init__(self) -> None:
        self._names = [f"cpm{os.getpid()}{name}" for name in NAMES]
        self._limited = False

    def __enter__(self) -> TwoHosts:
        first, second = self._names
        try:
            for name in self._names:
                _call("ip", "netns", "add", name)
            ends = (LINK, "netns", first, "type", "veth", "peer", "name", LINK)
            _call("ip", "link", "add", *ends, "netns", second)
            for number, name in enumerate(self._names, start=1):
                _call("ip", "-n", name, "addr", "add", f"10.0.0.{number}/24", "dev", LINK)
                for device in ("lo", LINK):
                    _call("ip", "-n", name, "link", "set", device, "up")
            self.limit(100.0)
            self.limit(None)
        except MissingError:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def limit(self, mbit: float | None) -> None:
        """Sets the rate of the link in each direction, in Mbit/s; None is as fast as it can be."""
        for name in self._names:
            place = ("-n", name, "qdisc"), ("dev", LINK, "root")
            if mbit is None:
                if self._limited:
                    _call("tc", *place[0], "del", *place[1])
                continue
            rate = int(mbit * MBIT)
            burst = max(LEAST_BURST, int(rate / 8 * LONGEST_BURST))
            bucket = ("tbf", "rate", f"{rate}bit", "burst", str(burst), "latency", "500ms")
            _call("tc", *place[0], "replace", *place[1], *bucket)
        self._limited = mbit is not None

    def host_of(self, size: int) -> partial[None]:
        """For a team of ``size``: moves a process to its host, half of the ranks on each."""
        return partial(enter, names=tuple(self._names), size=size)

    def _remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def set_network(path: Path) -> None:
    """Moves this thread, and those that it starts, into a network namespace.

    Python itself has ``os.setns`` from 3.12 on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))


def enter(place: Place, *, names: tuple[str, ...], size: int) -> None:
    """Moves this process to its host, and tells gloo to use the link."""
    name = names[place.rank * len(names) // size]
    set_network(Path("/var/run/netns") / name)
    os.environ["GLOO_SOCKET_IFNAME"] = LINK


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingError(f"{' '.join(words)}: {done.stderr.strip()}")
