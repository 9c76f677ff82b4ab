"""Checks that context and tensor parallel ranks made the same rows, in a sum that is sent anyway.

Each rank makes its rows from its own copy of the data. At the start of a run, ranks compare
fingerprints of the data; a copy that differs elsewhere, or goes bad later, shows only in its rows.
So each rank adds a share to the message in which a step counts its tokens:

    group of n ranks    first rank (n - 1) h    each other rank -h     sum 0 if all h are equal

h is a hash of the rows and of the group's number, so that groups do not cancel each other. It is
small enough for the sum of all ranks to be exact in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.rng import hash_text
from cp_megatron.errors import ConfigError


def share(digests: Sequence[int], groups: ParallelGroups) -> float:
    """This rank's share of a sum over all ranks, which is 0 if all peers have the same digests."""
    grid, place = groups.grid, groups.coordinates
    bits = 52 - grid.world_size.bit_length()
    number = hash_text(f"{place.dp} {list(digests)}") % 2**bits
    return number * (grid.cp * grid.tp - 1 if place.cp == place.tp == 0 else -1)


def refuse_other_rows(digests: Sequence[int], groups: ParallelGroups, device: torch.device) -> None:
    """Names the ranks whose rows differ. Every rank calls it, and it raises on every rank.

    Raises:
        ConfigError: always.
    """
    mine = torch.tensor([hash_text(str(list(digests)))], device=device)
    all_digests = [torch.empty_like(mine) for _ in range(groups.grid.world_size)]
    dist.all_gather(all_digests, mine, group=groups.world)
    firsts: dict[int, int] = {}  # the first rank of each group
    texts = []
    for rank, digest in enumerate(all_digests):
        first = firsts.setdefault(groups.grid.coordinates(rank).dp, rank)
        if digest != all_digests[first]:
            texts.append(f"rank {rank} other rows than rank {first}")
    rule = f"gives the ranks that share rows different ones: {', '.join(texts[:8])}"
    raise ConfigError("--data-path", "", rule, "the same files on every node")
