"""Hosts on one machine: Linux namespaces whose links can be cut, slowed down or made lossy.

    node0  link0 --- port0 \\
    node1  link0 --- port1  > bridge, in a namespace of its own
    node2  link0 --- port2 /

A host has its own network, name, process numbers and file of host names, and shares the disk. The
namespaces have no names and last as long as their first processes, which end when their standard
input closes. So nothing stays when the program that made them is killed, and nothing is changed
outside them. It takes root, ``ip`` and ``tc`` (iproute2), ``unshare`` and ``nsenter`` (util-linux).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

LINK = "link0"  # the name of a host's network device
BRIDGE = "bridge"
MBIT = 1e6  # bits per second
LONGEST_BURST = 0.002  # seconds at the link's rate that a pause saves up, which then pass at once
LEAST_BURST = 64 << 10  # bytes: the largest packet
TOOLS = ("ip", "tc", "unshare", "nsenter")


class MissingError(Exception):
    """The machine lacks something that hosts need."""


def why_not() -> str | None:
    """What this machine lacks; None if it seems to have all that hosts need."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [name for name in TOOLS if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found (iproute2, util-linux)" if missing else None


class Host:
    """One host; its namespaces are those of ``process`` and of what it starts."""

    def __init__(self, name: str, names_file: Path) -> None:
        self.name = name
        begin = f"hostname {name} && mount --bind {names_file} /etc/hosts"
        self.process = _Namespace(["--uts", "--pid", "--fork", "--mount-proc"], begin)

    def command(self, words: Sequence[str], folder: Path = Path("/")) -> list[str]:
        """The command that runs ``words`` on this host, in ``folder``."""
        pid = self.process.pid
        inside = ["--uts", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children"]
        return [*self.process.enter, *inside, "env", "-C", str(folder), *words]

    def kill(self) -> None:
        """Kills all processes of this host. It has a network after that, and can start others."""
        _call(*self.command(["sh", "-c", "kill -9 -1 || true"]))

    @property
    def network_path(self) -> Path:
        """The file that stands for its network namespace."""
        return Path(f"/proc/{self.process.pid}/ns/net")


class Network:
    """Hosts named ``node0``, ``node1`` and so on, for a ``with`` statement.

    Raises:
        MissingError: the kernel refuses a namespace, a device or a rate.
    """

    def __init__(self, num_hosts: int) -> None:
        self._num_hosts = num_hosts
        self.hosts: list[Host] = []

    def __enter__(self) -> Network:
        with tempfile.TemporaryDirectory() as folder:  # a mounted file stays without its name
            names_file = Path(folder) / "hosts"
            names = [f"{_address(number)} node{number}" for number in range(self._num_hosts)]
            names_file.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
            try:
                self._switch = _Namespace([], "true")
                self._at_switch("ip", "link", "add", BRIDGE, "type", "bridge")
                self._at_switch("ip", "link", "set", BRIDGE, "up")
                for number in range(self._num_hosts):
                    self.hosts.append(Host(f"node{number}", names_file))
                    self._connect(number)
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes of the hosts, and with them the namespaces."""
        for host in self.hosts:
            host.process.close()
        self._switch.close()

    def cut(self, number: int) -> None:
        """Cuts the link of a host."""
        self._at_switch("ip", "link", "set", _port(number), "down")

    def mend(self, number: int) -> None:
        """Connects a host again."""
        self._at_switch("ip", "link", "set", _port(number), "up")

    def limit(self, number: int, mbit: float) -> None:
        """Sets the rate of a host's link, in Mbit/s for each direction."""
        rate = int(mbit * MBIT)
        burst = max(LEAST_BURST, int(rate / 8 * LONGEST_BURST))
        bucket = ["tbf", "rate", f"{rate}bit", "burst", str(burst), "latency", "500ms"]
        self._at_host(number, "tc", "qdisc", "replace", "dev", LINK, "root", *bucket)
        self._at_switch("tc", "qdisc", "replace", "dev", _port(number), "root", *bucket)

    def unlimit(self, number: int) -> None:
        """Lets the link of a host be as fast as it can, after ``limit``."""
        self._at_host(number, "tc", "qdisc", "del", "dev", LINK, "root")
        self._at_switch("tc", "qdisc", "del", "dev", _port(number), "root")

    def lose(self, number: int, share: float) -> None:
        """Drops this share of a host's packets, in each direction.

        A filter of four instructions does it, because some kernels lack the queue ``netem``.
        """
        load_random, greater, end = "32 0 0 4294963256", f"37 0 1 {int(share * 2**32)}", "6 0 0"
        program = f"4,{load_random},{greater},{end} 4294967295,{end} 2"  # go on, or drop
        self._at_host(number, "tc", "qdisc", "add", "dev", LINK, "clsact")
        for direction in ("ingress", "egress"):
            place = ["tc", "filter", "add", "dev", LINK, direction]
            self._at_host(number, *place, "bpf", "da", "bytecode", program)

    def lost(self, number: int) -> int:
        """How many packets ``lose`` has dropped."""
        text = self._at_host(number, "tc", "-s", "qdisc", "show", "dev", LINK, "clsact")
        return int(re.findall(r"dropped (\d+)", text)[0])

    def keep(self, number: int) -> None:
        """Ends ``lose``."""
        self._at_host(number, "tc", "qdisc", "del", "dev", LINK, "clsact")

    def _connect(self, number: int) -> None:
        pid = str(self.hosts[number].process.pid)
        ends = [_port(number), "type", "veth", "peer", "name", LINK, "netns", pid]
        self._at_switch("ip", "link", "add", *ends)
        self._at_switch("ip", "link", "set", _port(number), "master", BRIDGE, "up")
        self._at_host(number, "ip", "addr", "add", f"{_address(number)}/24", "dev", LINK)
        for device in ("lo", LINK):
            self._at_host(number, "ip", "link", "set", device, "up")

    def _at_host(self, number: int, *words: str) -> str:
        return _call(*self.hosts[number].process.enter, *words)

    def _at_switch(self, *words: str) -> None:
        _call(*self._switch.enter, *words)


class _Namespace:
    """A process in a network namespace of its own, which runs until ``close``.

    Args:
        kinds: options of ``unshare`` for what else it does not share.
        begin: a shell command that it runs first.
    """

    def __init__(self, kinds: Sequence[str], begin: str) -> None:
        script = f"{begin} && echo ready && exec cat"
        command = ["unshare", "--net", *kinds, "sh", "-c", script]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise MissingError(f"{' '.join(command)}: {self._process.communicate()[1].strip()}")

    @property
    def enter(self) -> list[str]:
        """The beginning of a command that runs in its network, without its other namespaces."""
        return ["nsenter", "--target", str(self.pid), "--net"]

    def close(self) -> None:
        self._process.communicate()


def _port(number: int) -> str:
    return f"port{number}"


def _address(number: int) -> str:
    return f"10.0.0.{number + 1}"


def _call(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
