"""Numbers that change by themselves: which rank's memory or links can not be trusted.

Three sums of bits, which a flipped one always changes (comm/checksums.py):

    update    take sums                    of the parameters this rank holds
    ...       forward, backward            nothing may write parameters
    update    compare, take sums           a difference: this rank's memory
    check     compare; ranks that hold the same parameters for tensor parallelism compare theirs
              (a difference: an update went wrong somewhere); and both ends of every link what the
              exchanges of the checked step sent and received (a difference: the receiver's link)

The first is done at every step and asks nobody; every ``interval`` steps, and before a save, all
ranks hear of it. What is not seen: arithmetic that is wrong on a rank whose results no other rank
has too, and messages that are added up on their way (FSDP's gradients, those of ``all_gather``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cp_megatron.comm.checksums import LinkSums, bit_sum
from cp_megatron.comm.groups import ParallelGroups


class ParameterSums:
    """The sums of the parameters that this rank holds.

    Args:
        named: name and parameter, sharded; in the same order on every rank.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        pairs = list(named)
        self._names = [name for name, _ in pairs]
        self._held = [x.to_local() if isinstance(x, DTensor) else x for _, x in pairs]
        self._alike = [number for number, (_, x) in enumerate(pairs) if _is_replicated(x)]
        self._taken = self._sums()
        self._changed = torch.zeros_like(self._taken, dtype=torch.bool)

    def take(self) -> None:
        """After an update, or whatever else may write parameters."""
        self._taken = self._sums()

    def compare(self) -> None:
        """Before an update: notes what changed since the last ``take``; waits for nothing."""
        self._changed |= self._sums() != self._taken

    def changed(self) -> list[str]:
        """The parameters that ever changed in between."""
        return [name for name, found in zip(self._names, self._changed.tolist()) if found]

    def replicated(self) -> int:
        """One sum of the parameters that every tensor parallel rank holds alike."""
        found = self._taken[self._alike].tolist()
        # The place in the row counts: two parameters that changed places are a difference.
        total = sum((2 * place + 1) * bits for place, bits in enumerate(found))
        return (total + 2**63) % 2**64 - 2**63

    def _sums(self) -> Tensor:
        return torch.stack([bit_sum(x) for x in self._held])


def _is_replicated(parameter: Tensor) -> bool:
    """Whether every rank of the tensor parallel axis holds the same part."""
    if not isinstance(parameter, DTensor):
        return False
    axes = parameter.device_mesh.mesh_dim_names or ()
    return "tp" in axes and parameter.placements[axes.index("tp")].is_replicate()


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What the ranks ask one another every ``interval`` steps.

    Attributes:
        interval: steps between two checks.
        parameters: the sums that the training step takes and compares.
        links: of the context parallel group.
        groups: this rank's groups.
        control: a group of all ranks for CPU tensors.
        device: for the messages of the context parallel group.
    """

    interval: int
    parameters: ParameterSums
    links: LinkSums
    groups: ParallelGroups
    control: dist.ProcessGroup
    device: torch.device

    def due(self, step: int) -> bool:
        """Whether the links are summed in the step that makes ``step`` finished steps."""
        return step % self.interval == 0

    def begin(self, step: int) -> None:
        """Before the step that makes ``step`` finished steps."""
        if self.due(step) and self.groups.grid.cp > 1:
            self.links.open()

    def find(self, step: int) -> str | None:
        """What went wrong on which ranks, alike on every rank; None where nothing did.

        Args:
            step: finished steps. Called on every rank, always where ``due``.
        """
        text = self._of_this_rank(step)
        mine = torch.tensor([bool(text), self.parameters.replicated()])
        rows = [torch.empty_like(mine) for _ in range(self.control.size())]
        dist.all_gather(rows, mine, group=self.control)
        broken = [bool(row[0]) for row in rows]
        texts: list[Any] = [text] * len(rows)
        if any(broken):
            dist.all_gather_object(texts, text, group=self.control)
        found = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if broken[rank]]
        found += self._replicas([int(row[1]) for row in rows], broken)
        return "; ".join(found) or None

    def _of_this_rank(self, step: int) -> str:
        self.parameters.compare()
        found = []
        if names := self.parameters.changed():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"{names[0]}{more} changed between two updates")
        if self.due(step) and self.groups.grid.cp > 1:
            peers = self.links.close(self.groups.cp, self.device)
            senders = [dist.get_global_rank(self.groups.cp, peer) for peer in peers]
            if senders:
                found.append(f"what rank {', '.join(map(str, senders))} sent arrived changed")
        return ", ".join(found)

    def _replicas(self, sums: list[int], broken: list[bool]) -> list[str]:
        """Tensor parallel groups that do not hold alike what they should, and who is to blame."""
        found = []
        for group in self.groups.grid.groups("tp"):
            held = [sums[rank] for rank in group]
            most = max(held.count(value) for value in held)
            if most == len(held) or any(broken[rank] for rank in group):
                continue
            odd = [rank for rank in group if held.count(sums[rank]) < most]
            # Without a majority nobody can tell who is right.
            ranks = odd if 2 * most > len(held) else group
            text = f"rank {', '.join(map(str, ranks))}"
            found.append(f"{text}: parameters that tensor parallel ranks share differ")
        return found
