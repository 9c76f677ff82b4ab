"""What the ranks tell each other before a step, in one message between their hosts.

No device takes part, so a host learns how many tokens a step has, that its peers made the same
rows and whether a rank wishes to stop, while the device still computes the step before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.host_numbers import gather_numbers
from cp_megatron.train.row_agreement import check_same_rows, fold


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What is known about a global batch before it is trained on; the same on every rank."""

    num_tokens: int  # tokens that have a label
    num_counted: int  # tokens that balance experts, with a label or without; 0 without experts
    num_pairs: float  # as in ``Shard``, but over the whole global batch
    wish: int  # the largest wish to stop, as in ``Stopping``
    waited: float  # seconds that this rank waited for the others


def announce(
    digests: Sequence[int],
    num_tokens: int,
    num_counted: int,
    num_pairs: float,
    groups: ParallelGroups,
    control: dist.ProcessGroup,
    *,
    wish: int = 0,
) -> Announcement:
    """Tells the other ranks about this rank's micro batches. Every rank calls it before a step.

    Args:
        digests: of the rows of each micro batch, as in ``Shard``.
        num_tokens, num_counted, num_pairs: of this rank's part of them.
        groups: this rank's groups.
        control: a group of all ranks for CPU tensors.
        wish: this rank's wish to stop.

    Raises:
        ConfigError: ranks that share rows have different ones; on every rank.
    """
    arrived = time.perf_counter()
    # Tensor parallel ranks and stages share tokens and have the same counts: one rank's are added.
    counts = (num_tokens, num_counted, num_pairs)
    if groups.coordinates.tp > 0 or groups.coordinates.pp > 0:
        counts = (0, 0, 0.0)
    told = gather_numbers((fold(digests), *counts, wish), control)
    folded, tokens, counted, pairs, wishes = zip(*told)
    waited = time.perf_counter() - arrived
    check_same_rows(folded, groups.grid)
    return Announcement(
        num_tokens=int(sum(tokens)),
        num_counted=int(sum(counted)),
        num_pairs=sum(pairs),
        wish=int(max(wishes)),
        waited=waited,
    )
