"""Decides which rank broke a run: one that failed, is gone, or is stuck.

One broken rank breaks all others: ranks that exchange messages with it lose their connection or
time out, and then the ranks that wait for those. Each rank reports what happened to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["failed", "lost", "waited"]

_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|pair is not connected|closed by peer", re.I
)
_WAITED = re.compile(r"timed out|timeout", re.I)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The reason why a rank ended."""

    kind: Kind  # it ``failed`` by itself, ``lost`` a connection, or ``waited`` until a timeout
    where: str = ""  # the training step and the collective it was in
    traced: bool = False  # its stack trace is in the output of its launcher
    awaited: str = ""  # what it waited for, if it is known


def kind_of(error: BaseException) -> Kind:
    """Whether a rank failed by itself, or because of another rank."""
    if isinstance(error, (RuntimeError, OSError)):
        if _LOST.search(str(error)):
            return "lost"
        if _WAITED.search(str(error)):
            return "waited"
    return "failed"


def judge(
    reports: Mapping[int, Report],
    *,
    world_size: int,
    alive: Collection[int],
    seen: Mapping[int, str],
) -> tuple[tuple[int, ...], str]:
    """Which ranks broke the run, given the reports of all ranks that could make one.

    A rank without a report and without a sign of life is gone, or its process is stopped. If all
    ranks are alive and some timed out, those without a report are stuck somewhere else. If all
    timed out, they wait for different messages, which their reports show.

    Args:
        reports: by rank; no rank failed by itself.
        world_size: number of ranks.
        alive: ranks whose process has shown a sign of life since.
        seen: a description of each rank's process, such as ``process 12 on host``.

    Returns:
        The ranks, none if the reports do not identify any, and one line for the user.
    """
    silent = [rank for rank in range(world_size) if rank not in reports]
    gone = [rank for rank in silent if rank not in alive]
    waited = any(report.kind == "waited" for report in reports.values())
    shown = [(rank, reports[rank]) for rank in sorted(reports)[:3] if reports[rank].where]
    parts = [f"rank {rank} {_ended(report)} in {report.where}" for rank, report in shown]
    details = f" ({'; '.join(parts)})" if parts else ""
    blamed = tuple(gone or (silent if waited else ()))
    if not blamed:
        # If all of them wait, a rank has left out a message or sent a different one.
        broken = "the ranks wait for different messages"
        broken = broken if waited else "a connection between the ranks broke"
        return (), f"{broken}{details}"
    who = ", ".join(f"rank {rank} ({seen.get(rank, 'its process')})" for rank in blamed)
    does, runs = ("does", "is") if len(blamed) == 1 else ("do", "are")
    what = f"{does} not answer" if gone else f"{runs} running but did not join the collective"
    return blamed, f"{who} {what}{details}"


def _ended(report: Report) -> str:
    """How a rank ended, as a verb."""
    awaited = f" for {report.awaited}" if report.awaited else ""
    if report.kind == "waited":
        return f"waited{awaited}"
    lost = f"lost its peer, waiting{awaited}," if awaited else "lost its peer"
    return "failed" if report.kind == "failed" else lost
