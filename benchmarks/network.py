"""What does a slow network cost, and which exchange suits it?

Two hosts are two Linux network namespaces on this machine, joined by a link whose rate ``tc``
sets; that needs root. Ranks exchange keys and values over gloo, half of them on each host. Where
it cannot run, it prints a line that says why.

Measured is causal attention, forward and backward, with 8 heads of 64 and 4 key/value heads in
float32. A rate is given as a multiple of the one at which a ring of whole shards takes as long as
the computation itself, and so would double the time of attention if nothing were hidden: such a
ring sends 3 (N - 1) shards of keys and values over the link, one forward and two backward. p2p runs
with whole messages, and with messages in two and in four parts.

Prints one JSON line per number of ranks, rate and exchange, with the hardware:

- ``ms``, and ``waiting_ms``: what a rank waits for messages during it, as the mean over ranks;
- ``waiting_share``: waiting over ``compute_ms``, the time of p2p without its waiting on the link
  without a limit;
- ``over_fastest``: paired with the fastest exchange at this rate;

and one line per number of ranks and rate for ``auto``, with what it picks if it is told the rates
of the link and of the computation, and how much longer that takes than the fastest. A link without
a limit is taken for one of 10 Gbit/s.

    python benchmarks/network.py                            # minutes
    python benchmarks/network.py --ranks 2 --rates 1 --rounds 5
    python benchmarks/network.py --quick
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from harness import contestants
from harness.contestants import Contestant
from harness.hosts import TwoHosts
from harness.teams import PAUSE, Place, Team, hardware, paired
from torch.profiler import ProfilerActivity, profile

from cp_megatron.config.words import read_options
from cp_megatron.plan import Mask, Rates, Schedule, SequenceLayout
from tests.hosts import MBIT, MissingError, why_not

HEADS, KV_HEADS, HEAD_DIM, BYTES = 8, 4, 64, 4
LOOPBACK_MBIT = 10_000
WAITING = ("wait for", "all-to-all of heads")  # names of traced ranges (comm/trace.py)
EXCHANGES: Mapping[str, Mapping[str, Any]] = {
    "p2p ring": {"exchange": "p2p", "route": "ring", "message_parts": 1},
    "p2p ring, 2 parts": {"exchange": "p2p", "route": "ring", "message_parts": 2},
    "p2p ring, 4 parts": {"exchange": "p2p", "route": "ring", "message_parts": 4},
    "p2p direct": {"exchange": "p2p", "route": "direct", "message_parts": 1},
    "all_gather": {"exchange": "all_gather"},
    "a2a": {"exchange": "a2a"},
    "a2a+p2p": {"exchange": "a2a+p2p"},
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Attention over two hosts whose link is slow."""

    ranks: tuple[int, ...] = (2, 4)
    """Numbers of ranks, half of them on each host."""
    tokens: int = 4096
    """Tokens of the row."""
    rates: tuple[float, ...] = (4.0, 1.0, 0.5)
    """Rates of the link, as multiples of the one described above."""
    rounds: int = 7
    """Measured rounds."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""


class Bench:
    """Answers the parent's questions in each process."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.passes: dict[str, Contestant] = {}

    def prepare(self, tokens: int) -> None:
        """Prepares every exchange."""
        group, mask, size = dist.group.WORLD, Mask.causal(tokens), self.place.size
        q, k, v, dout = contestants.inputs(tokens, HEADS, HEAD_DIM)
        tensors = [q, k[:, :, :KV_HEADS], v[:, :, :KV_HEADS], dout]
        sizes = {"hierarchical_sizes": (size // 2, 2)}
        for name in names_of(size):
            options = dict(EXCHANGES[name], **(sizes if name == "a2a+p2p" else {}))
            self.passes[name] = contestants.engine(group, tensors, mask, **options)

    def measure(self, name: str) -> tuple[float, float, float]:
        """Times at which a pass began and ended, and the seconds of waiting in it."""
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            begin = time.monotonic()
            self.passes[name].run()
            end = time.monotonic()
        rows = [row for row in recorded.key_averages() if row.key.startswith(WAITING)]
        return begin, end, sum(row.cpu_time_total for row in rows) * 1e-6


def names_of(size: int) -> list[str]:
    """The exchanges that ``size`` ranks on two hosts can run and that differ."""
    if size == 2:  # the neighbour is the owner, and a host has one rank
        return [name for name in EXCHANGES if name not in ("p2p direct", "a2a+p2p")]
    return list(EXCHANGES)


def run(team: Team, name: str) -> tuple[float, float]:
    """Seconds of a pass, and of a rank's waiting in it."""
    time.sleep(PAUSE)
    spans = team.ask("measure", name)
    seconds = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
    return seconds, statistics.fmean(waiting for *_, waiting in spans)


def pick(tokens: int, size: int, rates: Rates) -> tuple[str, str]:
    """The name of what ``auto`` picks, and why."""
    mask = Mask.causal(tokens)
    layout = SequenceLayout.make(mask, size, "zigzag")
    sizes = (size // 2, 2) if size > 2 else None
    heads = HEADS, KV_HEADS, sizes
    chosen = Schedule.build(mask, layout, "auto", "auto", *heads, head_dim=HEAD_DIM, rates=rates)
    route = f" {chosen.route}" if chosen.exchange == "p2p" else ""
    parts = f", {chosen.message_parts} parts" if chosen.message_parts > 1 else ""
    return f"{chosen.exchange}{route}{parts}", chosen.reason


def rates_of(tokens: int, size: int, seconds: float, mbit: float) -> Rates:
    """What a user would state of this link and of ranks that compute for ``seconds``."""
    flops = 3.5 * 2 * Mask.causal(tokens).pairs() * HEADS * 2 * HEAD_DIM  # 2.5 of them backward
    network = mbit * MBIT / 8 / (size // 2)  # a host's ranks share the link
    return Rates(network / 1e9 * 2 / BYTES, flops / size / seconds / 1e12)


def doubling_rate(tokens: int, size: int, seconds: float) -> float:
    """The rate, in Mbit/s, at which a ring of whole shards takes ``seconds``."""
    shard = tokens // size * KV_HEADS * 2 * HEAD_DIM * BYTES
    return 3 * (size - 1) * shard * 8 / seconds / MBIT


def results(
    hosts: TwoHosts, size: int, arguments: Arguments, rounds: int
) -> Iterator[dict[str, object]]:
    """All results of one number of ranks."""
    team = Team(size, 1, Bench, hosts.host_of(size))
    team.ask("prepare", arguments.tokens)
    for name in names_of(size) * 2:
        run(team, name)
    free = [run(team, "p2p ring") for _ in range(rounds)]
    compute = statistics.median(seconds - waiting for seconds, waiting in free)
    unit = doubling_rate(arguments.tokens, size, compute)
    rates = [None, *arguments.rates]
    found: dict[tuple[float | None, str], list[tuple[float, float]]] = {}
    order, shuffle = [*names_of(size)], random.Random(0).shuffle
    for _ in range(rounds):
        for rate in rates:
            hosts.set_rate(None if rate is None else rate * unit)
            shuffle(order)
            for name in order:
                found.setdefault((rate, name), []).append(run(team, name))
    hosts.set_rate(None)
    team.close()
    for rate in rates:
        seconds = {name: [each for each, _ in found[rate, name]] for name in names_of(size)}
        fastest = min(seconds, key=lambda name: statistics.median(seconds[name]))
        head: dict[str, object] = {"ranks": size, "rate": rate, "compute_ms": round(compute * 1e3)}
        head["mbit"] = None if rate is None else round(rate * unit)
        mbit = LOOPBACK_MBIT if rate is None else rate * unit
        stated = rates_of(arguments.tokens, size, compute, mbit)
        picked, reason = pick(arguments.tokens, size, stated)
        over = {name: paired(seconds[name], seconds[fastest]) for name in seconds}
        for name in seconds:
            waiting = statistics.median(each for _, each in found[rate, name])
            yield head | {
                "exchange": name,
                "ms": round(statistics.median(seconds[name]) * 1e3, 1),
                "waiting_ms": round(waiting * 1e3, 1),
                "waiting_share": round(waiting / compute, 4),
                "over_fastest": over[name],
            }
        yield head | {
            "exchange": "auto",
            "picks": picked,
            "reason": reason,
            "stated": {"network_gb": stated.network, "attention_tflops": stated.attention},
            "over_fastest": over.get(picked),
        }


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    rounds = arguments.rounds
    if arguments.quick:
        arguments, rounds = Arguments(ranks=(2,), tokens=256, rates=(1.0,)), 2
    machine = hardware()
    reason = why_not()
    if reason is None:
        try:
            with TwoHosts() as hosts:
                for size in arguments.ranks:
                    for line in results(hosts, size, arguments, rounds):
                        line = {"benchmark": "network", "tokens": arguments.tokens, **line}
                        print(json.dumps({**line, "hardware": machine}), flush=True)
        except MissingError as error:
            reason = str(error)
    if reason is not None:
        line = {"benchmark": "network", "result": "not run", "reason": reason}
        print(json.dumps({**line, "hardware": machine}), flush=True)


if __name__ == "__main__":
    main()
