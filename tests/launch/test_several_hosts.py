"""Several hosts for real: does each launcher say what it lost, and does the run go on?

The hosts are network namespaces (``tests/hosts.py``). Each runs torchrun with the command for
several nodes of launch/README.md, and all share a folder.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import MissingError, Network, why_not
from tests.launch.test_end_to_end import SCRIPT, Program, at_step
from tests.train.checkpoints import differing, metrics_of, numbers

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"did not run: {REASON}"),
    pytest.mark.timeout(600),
]

STEPS, SAVED = 12, 4
BROKEN = 6
"""The step that is logged before something breaks."""
TIMEOUT = 9.0
"""Seconds that a rank waits for a message."""
NAMING = 6.0
"""Seconds after that until what was lost is named on each host."""
MBIT = 40.0
"""The rate of links of which one becomes slow: a step of CP takes about as long as without it."""
LOST = 0.01
"""The share of packets that is lost."""
QUIET = ("--no-log-straggler",)
"""Without the messages between two steps, a step is most of the time."""


@dataclass(frozen=True)
class Grid:
    """A run over several hosts. To test another one, add it to ``GRIDS``."""

    hosts: int
    ranks_per_host: int
    flags: tuple[str, ...]
    num_layers: int = 1

    def ranks_of(self, host: int) -> list[int]:
        """torchrun numbers the ranks in the order of the names of their hosts."""
        first = host * self.ranks_per_host
        return [*range(first, first + self.ranks_per_host)]


GRIDS: Mapping[str, Grid] = {
    "cp-over-three": Grid(3, 1, ("--context-parallel-size", "3")),
    "cp-over-two-tp-within": Grid(
        2, 2, ("--context-parallel-size", "2", "--tensor-parallel-size", "2")
    ),
    "hsdp-over-two": Grid(2, 2, ("--data-parallel-replicate-size", "2")),
    "pp-over-two-cp-within": Grid(
        hosts=2,
        ranks_per_host=2,
        flags=(
            *("--pipeline-parallel-size", "2", "--context-parallel-size", "2"),
            *("--micro-batch-size", "1"),
        ),
        num_layers=2,
    ),
}


class Run:
    """A run over the hosts of a network: one launcher on each.

    Args:
        folder: what the hosts share.
        save: the name of the run's folder.
        flags: of this run alone.
    """

    def __init__(
        self, grid: Grid, network: Network, folder: Path, save: str, flags: Sequence[str]
    ) -> None:
        self.grid, self.network, self.path = grid, network, folder / save
        nodes = ["--nnodes", str(grid.hosts), "--nproc-per-node", str(grid.ranks_per_host)]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500"]
        length = ["--train-iters", str(STEPS), "--save-interval", str(SAVED)]
        model = ["--preset", "toy", "--num-layers", str(grid.num_layers), "--hidden-size", "32"]
        model += ["--lr-warmup-iters", "0", "--seq-length", "96"]
        rows = ["--global-batch-size", "4", "--data-path", "text"]
        log = ["--log-interval", "1", "--eval-iters", "0", "--device", "cpu"]
        waiting = ["--distributed-timeout-minutes", str(TIMEOUT / 60)]
        words = ["torchrun", *nodes, *meeting, SCRIPT, *model, *grid.flags, *length, *rows, *log]
        words += [*waiting, "--save", save, "--load", "auto", *flags]
        self.launchers: list[Program] = []
        for host in network.hosts:
            own = folder / f"{save}-{host.name}"
            own.mkdir(exist_ok=True)
            self.launchers.append(Program(host.command(words, folder), own))

    def when(self, ready: Callable[[str], bool]) -> Run:
        """Waits until the output of rank 0 is ready."""
        self.launchers[0].when(ready)
        return self

    def in_mid_step(self) -> Run:
        """Waits until the middle of the step after ``BROKEN``."""
        self.when(at_step(BROKEN))
        time.sleep(metrics_of(self.path)[-1]["step_seconds"] / 2)
        return self

    @property
    def out(self) -> str:
        """The output of rank 0."""
        return (self.launchers[0].folder / "out.txt").read_text()

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


@dataclass(frozen=True)
class Case:
    """A grid, its hosts, and the folder that they share with the undisturbed run in it."""

    grid: Grid
    network: Network
    folder: Path

    def start(self, save: str, *flags: str) -> Run:
        return Run(self.grid, self.network, self.folder, save, flags)


@pytest.fixture(scope="module", params=GRIDS)
def case(request: pytest.FixtureRequest, folder: Path) -> Iterator[Case]:
    grid = GRIDS[request.param]
    own = folder / request.param
    own.mkdir()
    (own / "text").symlink_to(folder / "text")
    try:
        with Network(grid.hosts) as network:
            case = Case(grid, network, own)
            case.start("whole").finished()
            yield case
    except MissingError as error:
        pytest.skip(f"did not run: {error}")


def test_an_undisturbed_run_is_whole(case: Case) -> None:
    rows = metrics_of(case.folder / "whole")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2


def named(ranks: Sequence[int], host: int, *, state: str = "") -> str:
    """The pattern of what is said of the ranks of a host."""
    process = rf"(?:stage \d, )?process \d+ on node{host}{state}"
    return ", ".join(rf"rank {rank} \({process}\)" for rank in ranks)


def goes_on(case: Case, save: str) -> None:
    """Starts a run again, as before; it must go on and end as if nothing had happened."""
    again = case.start(save, *QUIET).finished()
    (first, *_) = re.findall(r"step +(\d+)/", again.out)
    assert int(first) > 1, "it went on from a checkpoint"
    again.assert_equals(case.folder / "whole")


@pytest.mark.parametrize("lost", [0, -1], ids=["first", "last"])
def test_each_host_says_that_a_link_is_cut(case: Case, lost: int) -> None:
    grid, network = case.grid, case.network
    cut = lost % grid.hosts
    others = [host for host in range(grid.hosts) if host != cut]
    run = case.start(f"cut{cut}", *QUIET).in_mid_step()
    network.cut(cut)
    lines = run.said_within(TIMEOUT + NAMING, range(grid.hosts))
    print("\n".join(lines))
    met = r"do(es)? not answer \(rank \d waited"
    for host in others:
        assert re.match(rf"pretrain\.py: {named(grid.ranks_of(cut), cut)} {met}", lines[host])
    elsewhere = ", ".join(named(grid.ranks_of(host), host) for host in others)
    assert re.match(rf"pretrain\.py: {elsewhere} {met}", lines[cut])
    assert lines[cut].endswith(f"; no other host answers, so node{cut} itself may be cut off")
    run.kill()
    network.mend(cut)
    goes_on(case, f"cut{cut}")


@pytest.mark.parametrize("lost", [0, -1], ids=["first", "last"])
def test_the_other_hosts_say_that_a_host_is_gone(case: Case, lost: int) -> None:
    grid = case.grid
    gone = lost % grid.hosts
    others = [host for host in range(grid.hosts) if host != gone]
    run = case.start(f"gone{gone}", *QUIET).in_mid_step()
    case.network.hosts[gone].kill()
    lines = run.said_within(NAMING, others)
    print("\n".join(lines))
    words = named(grid.ranks_of(gone), gone, state=", gone")
    for line in lines:
        assert re.match(rf"pretrain\.py: {words} do(es)? not answer \(rank \d lost its peer", line)
    run.kill()
    goes_on(case, f"gone{gone}")


def test_a_slow_link_is_no_failure_and_its_rank_is_named(case: Case) -> None:
    grid, network = case.grid, case.network
    for host in range(grid.hosts):
        network.limit(host, MBIT)
    try:
        run = case.start("slow").when(at_step(BROKEN))
        network.limit(grid.hosts - 1, MBIT / 10)
        run.finished().assert_equals(case.folder / "whole")
    finally:
        for host in range(grid.hosts):
            network.unlimit(host)
    found = Counter(map(int, re.findall(r"messages of rank (\d+) to other hosts take", run.out)))
    print(found, *re.findall(r"step \d+: messages of .*", run.out), sep="\n")
    if grid.hosts > 2:  # of two, each has the other's slow link
        often = [rank for rank, _ in found.most_common(grid.ranks_per_host)]
        assert sorted(often) == grid.ranks_of(grid.hosts - 1)


def test_lost_packets_are_no_failure(case: Case) -> None:
    network, last = case.network, case.grid.hosts - 1
    run = case.start("lossy").when(at_step(BROKEN))
    network.lose(last, LOST)
    try:
        run.finished().assert_equals(case.folder / "whole")
        lost = network.lost(last)
    finally:
        network.keep(last)
    print(f"{lost} packets were lost")
    assert lost > 0
