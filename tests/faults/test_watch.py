"""What the ranks of each host say when a run breaks, with and without the store.

The ranks are threads of this process, named after their hosts; a host is cut off by ports that
never answer. tests/launch/test_several_hosts.py does the same to real hosts.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import HashStore

from cp_megatron.comm.runtime import Launch
from cp_megatron.faults import peers, watch
from cp_megatron.faults.culprit import Report
from cp_megatron.faults.watch import Watch

WAITED = RuntimeError("[gloo] Timed out waiting 9000ms for recv operation to complete")
LOST = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:1")
for one in (WAITED, LOST):
    one.add_note("step 7")


class SilentStore:
    """A store that cannot be reached: a request never returns."""

    def add(self, key: str, amount: int) -> int:
        threading.Event().wait()
        raise AssertionError


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's host has the thread's name, and nobody waits for long."""
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
    for module, name, seconds in (
        (peers, "ANSWER_SECONDS", 0.5),
        (watch, "ANSWER_SECONDS", 0.5),
        (watch, "REPORT_SECONDS", 0.3),
        (watch, "STORE_SECONDS", 0.2),
    ):
        monkeypatch.setattr(module, name, seconds)


def on_hosts(hosts: Sequence[str], call: Callable[[int], object]) -> None:
    """Calls this for each rank at the same time, on its host."""
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            call(rank)
        except BaseException as error:
            errors.append(error)

    ranks = range(len(hosts))
    threads = [threading.Thread(target=guarded, args=(n,), name=hosts[n]) for n in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []


def watches_of(hosts: Sequence[str], folder: Path, *, store: bool) -> list[Watch]:
    """The watches of ranks on these hosts; without ``store``, it is gone after the start."""
    common, made = HashStore(), dict[int, Watch]()

    def make(rank: int) -> None:
        launch = Launch(rank=rank, world_size=len(hosts))
        made[rank] = Watch(
            launch, common, folder=folder, program="pretrain.py", orphaned=lambda: None
        )
        if not store:
            made[rank]._store = SilentStore()  # type: ignore[assignment]

    on_hosts(hosts, make)
    return [made[rank] for rank in range(len(hosts))]


@pytest.fixture
def silent_port() -> Iterator[int]:
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def refusing_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def redirect(made: Sequence[Watch], port: int, *links: tuple[int, int]) -> None:
    """Messages from the first rank of each link to the second arrive at ``port``."""
    for sender, receiver in links:
        processes = made[sender]._peers.processes
        processes[receiver] = replace(processes[receiver], address="127.0.0.1", port=port)


def both(*pairs: tuple[int, int]) -> list[tuple[int, int]]:
    return [*pairs, *((b, a) for a, b in pairs)]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, without the number of this process, sorted."""
    lines = capsys.readouterr().err.splitlines()
    return sorted(re.sub(rf"process {os.getpid()}\b", "process N", line) for line in lines)


@pytest.mark.parametrize("store", [True, False])
def test_each_host_says_what_it_lost(
    store: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], silent_port: int
) -> None:
    hosts = ["node0", "node1", "node2"]
    made = watches_of(hosts, tmp_path, store=store)
    redirect(made, silent_port, *both((0, 1), (0, 2)))
    on_hosts(hosts, lambda rank: made[rank].explain(WAITED))
    alone = "rank 1 (process N on node1), rank 2 (process N on node2) do not answer"
    together = "(rank 1 waited in step 7; rank 2 waited in step 7)"
    assert said(capsys) == [
        *[f"pretrain.py: rank 0 (process N on node0) does not answer {together}"] * 2,
        f"pretrain.py: {alone} (rank 0 waited in step 7); no other host answers, so node0 itself "
        "may be cut off",
    ]


@pytest.mark.parametrize("store", [True, False])
def test_one_rank_of_a_host_speaks(
    store: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refusing_port: int,
) -> None:
    hosts = ["node0", "node0", "node1", "node1", "node2"]
    made = watches_of(hosts, tmp_path, store=store)
    redirect(made, refusing_port, *((rank, 4) for rank in range(4)))
    on_hosts(hosts[:4], lambda rank: made[rank].explain(LOST))
    met = "; ".join(f"rank {rank} lost its peer in step 7" for rank in range(3))
    line = f"pretrain.py: rank 4 (process N on node2, gone) does not answer ({met})"
    assert said(capsys) == [line] * 2


def test_a_host_is_told_once_although_its_ranks_break_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refusing_port: int
) -> None:
    hosts = ["node1", "node1", "node0"]
    made = watches_of(hosts, tmp_path, store=False)
    redirect(made, refusing_port, (0, 2), (1, 2))
    for late in (1, 0):
        on_hosts(hosts, lambda rank, late=late: made[rank].explain(LOST) if rank == late else None)
    line = "pretrain.py: rank 2 (process N on node0, gone) does not answer"
    assert said(capsys) == [f"{line} (rank 1 lost its peer in step 7)"]


def test_a_stack_trace_is_printed_once_and_other_hosts_refer_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = ["node0", "node0", "node1", "node1"]
    made = watches_of(hosts, tmp_path, store=True)
    on_hosts(hosts, lambda rank: made[rank].explain(LOST if rank else ValueError("wrong")))
    lines = [line for line in said(capsys) if line.startswith("pretrain.py: ")]
    assert lines == [
        "pretrain.py: rank 0 (process N on node0) failed; the output of its launcher has the stack "
        "trace",
        "pretrain.py: rank 0 failed",
    ]


def test_a_rank_that_waits_for_ranks_that_gave_up_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its host is told as well, which no other rank may be left to do."""
    left = threading.Event()

    def leave(code: int) -> None:
        left.set()
        threading.Event().wait()

    killed: list[int] = []
    monkeypatch.setattr(watch.os, "_exit", leave)
    monkeypatch.setattr(watch.os, "kill", lambda pid, number: killed.append(pid))
    monkeypatch.setattr(watch, "OVER_SECONDS", 0.2)
    hosts = ["node0", "node1"]
    made = watches_of(hosts, tmp_path, store=True)
    with made[1]:
        on_hosts(hosts[:1], lambda rank: made[0].explain(WAITED))
        assert left.wait(10)
    assert killed == [os.getpid()], "as one that is stuck; the others' hosts kill only their own"
    assert said(capsys) == [
        "pretrain.py: rank 1 (process N on node1) is running but did not join the collective "
        "(rank 0 waited in step 7)",
        "pretrain.py: rank 1 (process N on node1, running) is running but did not join the "
        "collective (rank 0 waited in step 7)",
    ]


def test_what_is_no_message_of_a_rank_is_ignored(tmp_path: Path) -> None:
    made = watches_of(["node0", "node1"], tmp_path, store=True)
    mine = made[0]._peers
    port = mine.processes[0].port
    report = '{"kind": "lost", "where": "", "traced": true}'
    for text in ("GET / HTTP/1.1", "", "[]", f'["token", 1, {report}]', '{"a": 1}'):
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(text.encode() + b"\n")
            assert connection.recv(1) == b"", "it is told nothing"
    assert mine.reports == {}
    assert mine.answered == set()
    made[1]._peers.tell(Report(kind="lost", where="step 3"))
    end = time.monotonic() + 10
    while 1 not in mine.reports and time.monotonic() < end:
        time.sleep(0.01)
    assert mine.reports == {1: Report(kind="lost", where="step 3")}
