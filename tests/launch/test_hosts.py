"""Several hosts for real: does each launcher say what it lost, and does the run go on?

The hosts are network namespaces (``tests/hosts.py``). Each runs torchrun with the command for
several nodes of launch/README.md, and all share a folder.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import MissingError, Network, why_not
from tests.launch.test_end_to_end import SCRIPT, SHAPE, Program, at_step
from tests.train.checkpoints import differing, metrics_of, numbers

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"did not run: {REASON}"),
    pytest.mark.timeout(600),
]

STEPS, SAVED = 24, 4
TIMEOUT = 9.0
"""Seconds that a rank waits for a message."""
NAMING = 5.0
"""Seconds after that until what was lost is named on each host."""


@dataclass(frozen=True)
class Grid:
    """A run over several hosts. To test another one, add it to ``GRIDS``."""

    hosts: int
    ranks_per_host: int
    flags: tuple[str, ...]

    def ranks_of(self, host: int) -> list[int]:
        """torchrun numbers the ranks in the order of the names of their hosts."""
        first = host * self.ranks_per_host
        return [*range(first, first + self.ranks_per_host)]


GRIDS = {
    "cp-over-two": Grid(2, 1, ("--context-parallel-size", "2")),
    "cp-over-three": Grid(3, 1, ("--context-parallel-size", "3")),
    "cp-over-two-tp-within": Grid(
        2, 2, ("--context-parallel-size", "2", "--tensor-parallel-size", "2")
    ),
    "hsdp-over-two": Grid(2, 2, ("--data-parallel-replicate-size", "2")),
}


class Run:
    """A run over the hosts of a network: one launcher on each.

    Args:
        folder: what the hosts share.
        save: the name of the run's folder.
    """

    def __init__(self, grid: Grid, network: Network, folder: Path, save: str) -> None:
        self.grid, self.network, self.path = grid, network, folder / save
        nodes = ["--nnodes", str(grid.hosts), "--nproc-per-node", str(grid.ranks_per_host)]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500"]
        length = ["--train-iters", str(STEPS), "--save-interval", str(SAVED)]
        model = ["--preset", "toy", *SHAPE, "--seq-length", "96"]
        rows = ["--global-batch-size", "4", "--data-path", "text"]
        log = ["--log-interval", "1", "--eval-iters", "0", "--device", "cpu"]
        waiting = ["--distributed-timeout-minutes", str(TIMEOUT / 60)]
        words = ["torchrun", *nodes, *meeting, SCRIPT, *model, *grid.flags, *length, *rows, *log]
        words += [*waiting, "--save", save, "--load", "auto"]
        self.launchers: list[Program] = []
        for host in network.hosts:
            own = folder / f"{save}-{host.name}"
            own.mkdir(exist_ok=True)
            self.launchers.append(Program(host.command(words, folder), own))

    def when(self, ready: Callable[[str], bool]) -> Run:
        """Waits until the output of rank 0 is ready."""
        self.launchers[0].when(ready)
        return self

    def said(self, host: int) -> list[str]:
        """The program's own lines in the output of a host's launcher."""
        text = (self.launchers[host].folder / "err.txt").read_text()
        return [line for line in text.splitlines() if line.startswith("pretrain.py: ")]

    def said_within(self, seconds: float, hosts: Sequence[int]) -> list[str]:
        """The first line of each of these hosts, which must come within ``seconds``."""
        end = time.monotonic() + seconds
        while not all(map(self.said, hosts)) and time.monotonic() < end:
            time.sleep(0.05)
        assert all(map(self.said, hosts)), {host: self.said(host) for host in hosts}
        time.sleep(1)
        assert [len(self.said(host)) for host in hosts] == [1] * len(hosts), "once on each host"
        return [self.said(host)[0] for host in hosts]

    def finished(self) -> Run:
        """Waits for the end, which must be a good one."""
        for launcher in self.launchers:
            ended = launcher.ended()
            assert ended.code == 0, ended.err
        return self

    def kill(self) -> None:
        """Ends what is left of the run, as a scheduler does when one of its hosts has failed."""
        for host in self.network.hosts:
            host.kill()
        for launcher in self.launchers:
            launcher.process.wait()

    def assert_equals(self, other: Path) -> None:
        """Compares checkpoint and metrics, bit for bit."""
        assert differing(other / f"step-{STEPS}", self.path / f"step-{STEPS}") == []
        rows = metrics_of(other), metrics_of(self.path)
        assert [numbers(row) for row in rows[0]] == [numbers(row) for row in rows[1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    return folder


@pytest.fixture(scope="module", params=GRIDS)
def case(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Grid, Network, Path]]:
    """A grid, its hosts, and the undisturbed run on them."""
    grid = GRIDS[request.param]
    try:
        with Network(grid.hosts) as network:
            whole = Run(grid, network, folder, f"{request.param}-whole").finished()
            yield grid, network, whole.path
    except MissingError as error:
        pytest.skip(f"did not run: {error}")
