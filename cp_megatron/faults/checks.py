"""Detects silent data corruption in parameters and messages.

The checks compare sums of bits, which change whenever a bit flips (comm/checksums.py):

    update    take sums                    of the parameters that this rank holds
    ...       forward, backward            nothing may write to the parameters
    update    compare sums, take sums      a difference: the memory of this rank
    check     compare sums; compare the sums of parameters that tensor parallel ranks, copies of
              the model, or its first and its last stage hold alike (a difference: a wrong update);
              compare what both ends of every link sent and received in the exchanges of the checked
              step, of context parallelism and between stages (a difference: the link of the
              receiver)

Every step compares sums on its own rank, without a message. All ranks share their findings every
``interval`` steps and before a save. The checks do not detect wrong arithmetic on a rank whose
results no other rank has, or corruption of messages that are reduced in transit (the gradients of
FSDP and of ``all_gather``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cp_megatron.checkpoint.object_collectives import all_gather_objects
from cp_megatron.comm.checksums import LinkSums, bit_sum
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.pipeline import StageLinks
from cp_megatron.plan import Grid


class ParameterSums:
    """Checksums of the parameters that this rank holds.

    Args:
        named: names and sharded parameters, in the same order on every rank.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        pairs = list(named)
        self._names = [name for name, _ in pairs]
        self._held = [x.to_local() if isinstance(x, DTensor) else x for _, x in pairs]
        self._alike = [number for number, (_, x) in enumerate(pairs) if _is_replicated(x)]
        self._taken = self._sums()
        self._changed = torch.zeros_like(self._taken, dtype=torch.bool)

    def take(self) -> None:
        """Takes the sums. Call it after an update or any other write to the parameters."""
        self._taken = self._sums()

    def compare(self) -> None:
        """Notes what has changed since the last ``take``, without waiting for the device.

        Call it before an update.
        """
        self._changed |= self._sums() != self._taken

    def changed(self) -> list[str]:
        """Names of the parameters that have ever changed between two updates."""
        return [name for name, changed in zip(self._names, self._changed.tolist()) if changed]

    def replicated(self) -> int:
        """One sum over the parameters that all tensor parallel ranks hold alike."""
        return self._total(self._taken[self._alike])

    def total(self) -> int:
        """One sum over all parameters of this rank."""
        return self._total(self._taken)

    def of(self, name: str) -> int:
        """The sum of one parameter; 0 if this rank has none of that name."""
        return int(self._taken[self._names.index(name)]) if name in self._names else 0

    def _total(self, taken: Tensor) -> int:
        sums = taken.tolist()
        # The sums are weighted by their place, so that two swapped parameters make a difference.
        total = sum((2 * place + 1) * bits for place, bits in enumerate(sums))
        return (total + 2**63) % 2**64 - 2**63

    def _sums(self) -> Tensor:
        return torch.stack([bit_sum(x) for x in self._held])


def _is_replicated(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    axes = parameter.device_mesh.mesh_dim_names or ()
    return "tp" in axes and parameter.placements[axes.index("tp")].is_replicate()


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The check of all ranks every ``interval`` steps."""

    interval: int
    parameters: ParameterSums  # the sums that the training step takes and compares
    links: LinkSums  # the sums of messages in the context parallel group
    stages: StageLinks  # the messages between the stages of a pipeline
    tied: bool  # the first stage and the last one hold the embedding's weight
    groups: ParallelGroups
    control: dist.ProcessGroup  # a group of all ranks for CPU tensors
    device: torch.device  # the device of messages

    def due(self, step: int) -> bool:
        """Whether this step is checked, which includes its messages."""
        return step % self.interval == 0

    def begin(self, step: int) -> None:
        """Call it before every step, with its number."""
        if self.due(step):
            if self.groups.grid.cp > 1:
                self.links.open()
            self.stages.open_sums()

    def find(self, step: int) -> str | None:
        """Describes what is corrupted on which ranks, alike on every rank; None if nothing is.

        Call it on every rank after a step that is ``due``, and before a save.

        Args:
            step: the number of the last finished step.
        """
        text = self._check_this_rank(step)
        sums = [self.parameters.replicated(), self.parameters.total()]
        sums.append(self.parameters.of("embedding.weight") if self.tied else 0)
        mine = torch.tensor([bool(text), *sums])
        rows = [torch.empty_like(mine) for _ in range(self.control.size())]
        dist.all_gather(rows, mine, group=self.control)
        broken = [bool(row[0]) for row in rows]
        texts = all_gather_objects(text, self.control) if any(broken) else []
        findings = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
        over_tp, whole, tied = ([int(row[place]) for row in rows] for place in (1, 2, 3))
        grid = self.groups.grid
        findings += _deviating(
            grid.groups("tp"), over_tp, broken, "parameters that tensor parallel ranks share differ"
        )
        findings += _deviating(_copies(grid), whole, broken, "copies of the model differ")
        ends = [[ranks[0], ranks[-1]] for ranks in grid.groups("pp")]
        findings += _deviating(ends, tied, broken, "copies of the embedding differ")
        return "; ".join(findings) or None

    def _check_this_rank(self, step: int) -> str:
        self.parameters.compare()
        findings = []
        if names := self.parameters.changed():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            findings.append(f"{names[0]}{more} changed between two updates")
        if self.due(step) and (senders := self._corrupted()):
            ranks = ", ".join(map(str, sorted(senders)))
            findings.append(f"messages from rank {ranks} arrived corrupted")
        return ", ".join(findings)

    def _corrupted(self) -> set[int]:
        """The ranks whose messages arrived corrupted on this rank."""
        senders = set[int]()
        if self.groups.grid.cp > 1:
            peers = self.links.close(self.groups.cp, self.device)
            senders |= {dist.get_global_rank(self.groups.cp, peer) for peer in peers}
        stages = self.stages.corrupted(self.device)
        return senders | {dist.get_global_rank(self.groups["pp"], stage) for stage in stages}


def _copies(grid: Grid) -> list[list[int]]:
    """The ranks that hold the same part of the model, one in each copy of it."""
    groups = defaultdict[tuple[int, ...], list[int]](list)
    for rank in range(grid.world_size):
        groups[grid.index("pp", rank), grid.index("tp", rank), grid.shard(rank)].append(rank)
    return list(groups.values())


def _deviating(
    groups: Iterable[Sequence[int]], sums: Sequence[int], broken: Sequence[bool], text: str
) -> list[str]:
    """Groups whose sums differ, and the ranks that deviate."""
    findings = []
    for group in groups:
        held = [sums[rank] for rank in group]
        most = max(held.count(value) for value in held)
        if most == len(held) or any(broken[rank] for rank in group):
            continue
        odd = [rank for rank in group if held.count(sums[rank]) < most]
        # Without a majority, any rank of the group may be the wrong one.
        ranks = odd if 2 * most > len(held) else group
        findings.append(f"rank {', '.join(map(str, ranks))}: {text}")
    return findings
