"""Do all ranks mean the same attention? One small message instead of a hang or a wrong number.

Ranks that disagree on the mask, a shape or a type would wait for messages that never come, or add
up what does not belong together. Before attending, every rank sends a digest of what it is about to
do and whether its inputs are sound; all of them see all digests, so all of them refuse together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from cp_megatron.comm.nonblocking import start_all_gather
from cp_megatron.errors import ConfigError

MODES = ("auto", "always", "once", "never")


def check_mode(mode: str | bool) -> str:
    """One of ``MODES``.

    Raises:
        ConfigError: it is none of them, nor True (auto) or False (never).
    """
    if isinstance(mode, bool):
        return "auto" if mode else "never"
    if mode not in MODES:
        raise ConfigError("check_ranks", mode, "is no way to check ranks", ", ".join(MODES))
    return mode


def agree(
    group: dist.ProcessGroup | None,
    *,
    mask: object,
    call: object,
    problem: Exception | None,
    device: torch.device,
) -> None:
    """Returns on every rank, or raises on every rank.

    Args:
        group: the ranks that must agree; None is one rank.
        mask: what describes the mask; compared by its ``repr``.
        call: what describes the rest: layout, exchange, shapes, types.
        problem: what this rank refuses by itself.
        device: where the group's messages live.

    Raises:
        Exception: ``problem`` itself.
        ConfigError: rank has a problem, or mask or call differ between ranks.
    """
    if group is not None and dist.get_world_size(group) > 1:
        facts = [digest(mask), digest(call), int(problem is not None)]
        mine = torch.tensor(facts, dtype=torch.int64, device=device)
        rows = start_all_gather(mine.unsqueeze(0), group).wait().tolist()
        if problem is None:
            _compare(rows, dist.get_rank(group), mask, call)
    if problem is not None:
        raise problem


def _compare(rows: Sequence[Sequence[int]], rank: int, mask: object, call: object) -> None:
    refusing = [number for number, row in enumerate(rows) if row[2]]
    if refusing:
        rule = f"is refused by rank {_list(refusing)} of the group, whose error says why"
        raise ConfigError("attention", f"on rank {rank}", rule)
    for column, name, value in ((0, "mask", mask), (1, "attention", call)):
        others = [number for number, row in enumerate(rows) if row[column] != rows[rank][column]]
        if others:
            rule = f"differs from what rank {_list(others)} of the group has"
            raise ConfigError(name, _short(value), rule, "the same on every rank")


def digest(value: object) -> int:
    """63 bits, the same on every machine and Python."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _short(value: object, limit: int = 120) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
