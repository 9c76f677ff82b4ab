"""Hosts of tests are connected, can be cut off, and vanish with the process that made them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import Network, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"did not run: {why_not()}")

SENDS = """
import socket, sys
with socket.create_connection(("node1", int(sys.argv[1])), 1) as connection:
    connection.sendall(socket.gethostname().encode())
"""
RECEIVES = """
import socket
with socket.create_server(("", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        print(server.accept()[0].recv(100).decode(), flush=True)
"""
MAKES = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from tests.hosts import Network
with Network(2) as network:
    print(*[host.process.pid for host in network.hosts], flush=True)
    time.sleep(60)
"""


def test_messages_arrive_until_the_link_is_cut() -> None:
    with Network(2) as network:
        sender, receiver = network.hosts
        command = receiver.command([sys.executable, "-c", RECEIVES])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip()

            def send() -> int:
                words = sender.command([sys.executable, "-c", SENDS, port])
                return subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode

            assert send() == 0
            assert server.stdout.readline() == "node0\n"
            network.cut(0)
            assert send() != 0
            network.mend(0)
            assert send() == 0
            receiver.kill()
            assert server.wait(5) != 0
            assert send() != 0, "nobody listens there"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_when_the_maker_is_ended(number: signal.Signals) -> None:
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", MAKES],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as maker:
        assert maker.stdout is not None
        pids = list(map(int, maker.stdout.readline().split()))
        assert len(pids) == 2
        os.kill(maker.pid, number)
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
