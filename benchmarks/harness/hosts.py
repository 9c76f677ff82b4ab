"""Two hosts on one machine, joined by a link whose rate can be set, for the ranks of a team.

The hosts are those of the tests of several hosts (``tests/hosts.py``).
"""

from __future__ import annotations

import ctypes
import os
from functools import partial
from pathlib import Path

from harness.teams import Place
from tests.hosts import LINK, Network

CLONE_NEWNET = 0x40000000


class TwoHosts(Network):
    """Two hosts, for a ``with`` statement.

    Raises:
        MissingError: the kernel refuses a namespace, a link or a rate.
    """

    def __init__(self) -> None:
        super().__init__(2)
        self._limited = False

    def set_rate(self, mbit: float | None) -> None:
        """Sets the rate of the link in each direction, in Mbit/s; None is as fast as it can be."""
        if mbit is not None:
            self.limit(0, mbit)
        elif self._limited:
            self.unlimit(0)
        self._limited = mbit is not None

    def host_of(self, size: int) -> partial[None]:
        """For a team of ``size``: moves a process to its host, half of the ranks on each."""
        networks = tuple(host.network_path for host in self.hosts)
        return partial(enter, networks=networks, size=size)


def set_network(path: Path) -> None:
    """Moves this thread, and those that it starts, into a network namespace.

    Python itself has ``os.setns`` from 3.12 on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))


def enter(place: Place, *, networks: tuple[Path, ...], size: int) -> None:
    """Moves this process to its host, and tells gloo to use the link."""
    set_network(networks[place.rank * len(networks) // size])
    os.environ["GLOO_SOCKET_IFNAME"] = LINK
