"""Who is to blame when a run breaks: a rank that failed, is gone, or is stuck. No torch.

One broken rank breaks all others: the ranks that talk to it lose their connection or wait in vain,
and so do those that talk to them. Each of them says what it met, and is heard here.
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
    """What ended a rank.

    Attributes:
        kind: ``failed`` by itself; it ``lost`` a connection; it ``waited`` in vain.
        where: the training step, and the collective that it was in.
    """

    kind: Kind
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whom to name.

    Attributes:
        ranks: the culprits; empty where nobody can tell.
        text: one line.
    """

    ranks: tuple[int, ...]
    text: str


def kind_of(error: BaseException) -> Kind:
    """Whether an exception is a rank's own, or one that another rank gave it."""
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
) -> Verdict:
    """Whom to name, once every rank that can speak has spoken.

    A rank that neither spoke nor shows a sign of life is gone, or its process is stopped. Where all
    live and some waited in vain, those that did not are stuck somewhere else; where all waited,
    they do not do the same, and what each waited for says where they part.

    Args:
        reports: by rank; no rank failed by itself.
        world_size: ranks in all.
        alive: ranks whose process showed a sign of life meanwhile.
        seen: what is known of a rank's process, ``process 12 on host``.
    """
    silent = [rank for rank in range(world_size) if rank not in reports]
    gone = [rank for rank in silent if rank not in alive]
    waited = any(report.kind == "waited" for report in reports.values())
    told = "; ".join(
        f"rank {rank} {_verb(reports[rank])}" for rank in sorted(reports)[:3] if reports[rank].where
    )
    told = f" ({told})" if told else ""
    if gone:
        who = ", ".join(f"rank {rank} ({seen.get(rank, 'its process')})" for rank in gone)
        what = "does not answer" if len(gone) == 1 else "do not answer"
        return Verdict(ranks=tuple(gone), text=f"{who} {what}{told}")
    if waited and silent:
        who = ", ".join(f"rank {rank} ({seen.get(rank, 'its process')})" for rank in silent)
        what = "lives and does" if len(silent) == 1 else "live and do"
        return Verdict(ranks=tuple(silent), text=f"{who} {what} not join the others{told}")
    if waited:
        # All of them wait: one has left out a message, or sent another than was waited for.
        return Verdict(ranks=(), text=f"the ranks wait for different messages{told}")
    return Verdict(ranks=(), text=f"a connection between the ranks broke{told}")


def _verb(report: Report) -> str:
    return f"{'waited' if report.kind == 'waited' else 'lost its peer'} in {report.where}"
