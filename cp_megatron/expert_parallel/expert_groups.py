"""The groups that a mixture of experts needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """Groups of this rank; None is one rank.

    Attributes:
        group: the ranks that share the experts, each of which has whole ones.
        row_group: the ranks that share the rows of a micro batch: those of cp and tp.
    """

    group: ProcessGroup | None = None
    row_group: ProcessGroup | None = None
