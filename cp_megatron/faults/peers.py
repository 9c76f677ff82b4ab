"""Direct connections between ranks, over which a rank that breaks tells the others.

They need no store, so they also serve the ranks of a host that is cut off from the store. Each rank
listens on a port of its own; the ranks exchange these ports through the store when they start.
What happens to a message shows the state of its receiver:

    it is answered          the process runs
    the host refuses it     the process is gone
    nothing comes back      the process is stopped, its host is gone, or the network between is cut
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from torch.distributed import Store  # type: ignore[attr-defined]

from cp_megatron.faults.culprit import Report

ANSWER_SECONDS = 2.0
"""How long a rank may take to answer; TCP repeats a lost packet after a second."""
_LOCAL_SECONDS = 0.1
_LONGEST = 1 << 16
_BACKLOG = 1024


@dataclass(frozen=True, kw_only=True)
class Process:
    """The process of a rank, and where it listens.

    Attributes:
        pid: its number on its host.
        host: the name of its host.
        address: the host's IP address; empty if it is known only as the address of the store.
        port: where the process listens.
        token: a random word that a message to it begins with, because anything on the network
            might connect to its port.
    """

    pid: int
    host: str
    address: str
    port: int
    token: str = field(default_factory=lambda: secrets.token_hex(8))


class Peers:
    """The connections of one rank. Every rank makes this at the same time.

    Args:
        rank: this rank.
        world_size: number of ranks.
        store: a store that all ranks reach while they start.
        key: the name under which ``store`` keeps where the ranks listen.
        master: the name or address of the host of the store, as all hosts know it.

    Attributes:
        processes: by rank.
        reports: the reports that are known, by rank.
        answered: ranks that have answered a message or sent one.
        refused: ranks whose host has refused a message.
        pending: ranks whose answer this rank waits for.
        spoken: ranks that have told the user what broke.
        first_heard: when the first report of another rank came, on the monotonic clock; else 0.
    """

    def __init__(self, rank: int, world_size: int, store: Store, key: str, master: str) -> None:
        self._rank = rank
        self.reports: dict[int, Report] = {}
        self.answered: set[int] = set()
        self.refused: set[int] = set()
        self.pending: set[int] = set()
        self.spoken: set[int] = set()
        self.first_heard = 0.0
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, backlog=_BACKLOG, dualstack_ipv6=both
        )
        # Names are looked up now: where a host is cut off, its name server may be as well.
        self._master, address = _addresses(master)
        self._mine = Process(
            pid=os.getpid(),
            host=socket.gethostname(),
            address=address,
            port=self._listener.getsockname()[1],
        )
        store.set(f"{key}/{rank}", json.dumps(asdict(self._mine)))
        texts = store.multi_get([f"{key}/{other}" for other in range(world_size)])
        self.processes = [Process(**json.loads(text)) for text in texts]
        threading.Thread(target=self._listen, daemon=True, name="peers").start()

    def tell(self, report: Report | None) -> None:
        """Sends this rank's report, if it has one, to all others; does not wait for answers."""
        if report is not None:
            self.reports[self._rank] = report
        self._send(range(len(self.processes)))

    def tell_spoken(self) -> None:
        """Tells the ranks of this host that this one has told the user, so they need not."""
        self.spoken.add(self._rank)
        host = self._mine.host
        here = [rank for rank, other in enumerate(self.processes) if other.host == host]
        for thread in self._send(here):
            thread.join(_LOCAL_SECONDS)

    def _send(self, ranks: Iterable[int]) -> list[threading.Thread]:
        others = [rank for rank in ranks if rank != self._rank]
        self.pending.update(others)
        threads = [threading.Thread(target=self._ask, args=(x,), daemon=True) for x in others]
        for thread in threads:
            thread.start()
        return threads

    def _ask(self, rank: int) -> None:
        process = self.processes[rank]
        place = (process.address or self._master, process.port)
        try:
            with socket.create_connection(place, ANSWER_SECONDS) as connection:
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(self._line(process.token))
                self._hear(connection, self._mine.token)
        except (ConnectionRefusedError, ConnectionResetError):
            self.refused.add(rank)
        except (OSError, ValueError):
            pass
        self.pending.discard(rank)

    def _listen(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection:
            connection.settimeout(ANSWER_SECONDS)
            rank = self._hear(connection, self._mine.token)
            connection.sendall(self._line(self.processes[rank].token))

    def _line(self, token: str) -> bytes:
        mine = self.reports.get(self._rank)
        spoken = self._rank in self.spoken
        return json.dumps([token, self._rank, mine and asdict(mine), spoken]).encode() + b"\n"

    def _hear(self, connection: socket.socket, token: str) -> int:
        """Reads a message and returns its sender.

        Raises:
            OSError: the connection broke.
            ValueError: this is no message to this rank.
        """
        with connection.makefile("rb") as file:
            words = json.loads(file.readline(_LONGEST))
        if not isinstance(words, list) or len(words) != 4 or words[0] != token:
            raise ValueError(f"no message of a rank: {words!r:.80}")
        _, rank, report, spoken = words
        if spoken:
            self.spoken.add(rank)
        if report is not None:
            self.reports[rank] = Report(**report)
            self.first_heard = self.first_heard or time.monotonic()
        self.answered.add(rank)
        return int(rank)


def _addresses(master: str) -> tuple[str, str]:
    """The IP address of the host of the store, and the one under which other hosts reach this host.

    The second is empty if the host of the store is this one and calls itself by a loopback address.
    """
    family, _, _, _, place = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing
        own = str(probe.getsockname()[0])
    return str(place[0]), "" if ipaddress.ip_address(own).is_loopback else own
