"""The grid of ranks: tensor parallel fastest, then context parallel, then data parallel.

World 8 as dp 2 x cp 2 x tp 2::

    rank = tp + TP * (cp + CP * dp)

              tp 0  tp 1
    dp 0 cp 0   0     1       tp groups  [0,1] [2,3] [4,5] [6,7]
         cp 1   2     3       cp groups  [0,2] [1,3] [4,6] [5,7]
    dp 1 cp 0   4     5       dp groups  [0,4] [1,5] [2,6] [3,7]
         cp 1   6     7       dp_cp      [0,2,4,6] [1,3,5,7]

Neighbours in TP talk most and so sit on one node; this is Megatron-LM's order ``tp-cp-dp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from cp_megatron.errors import ConfigError

Axis = Literal["dp", "cp", "tp", "dp_cp"]


class Coordinates(NamedTuple):
    """A rank's index on every axis."""

    dp: int
    cp: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The sizes of the dp, cp and tp axes."""

    dp: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def fit(cls, world_size: int, *, cp: int, tp: int) -> Grid:
        """The grid of ``world_size`` ranks in which data parallelism takes what cp and tp leave.

        Raises:
            ConfigError: a size is not positive, or the world size no multiple of cp x tp.
        """
        for flag, size in (("--context-parallel-size", cp), ("--tensor-parallel-size", tp)):
            if size < 1:
                raise ConfigError(flag, size, "must be positive", "1")
        inner = cp * tp
        if world_size % inner:
            below = world_size // inner * inner
            works = ", ".join(str(size) for size in (below, below + inner) if size)
            raise ConfigError(
                "world size",
                world_size,
                f"must be divisible by context parallel {cp} x tensor parallel {tp} = {inner}",
                f"{works} ranks",
            )
        return cls(dp=world_size // inner, cp=cp, tp=tp)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp * self.cp * self.tp

    def rank(self, *, dp: int, cp: int, tp: int) -> int:
        """The rank at these coordinates."""
        return tp + self.tp * (cp + self.cp * dp)

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` lies on every axis."""
        rest, tp = divmod(rank, self.tp)
        dp, cp = divmod(rest, self.cp)
        return Coordinates(dp=dp, cp=cp, tp=tp)

    def groups(self, axis: Axis) -> list[list[int]]:
        """The groups of ranks along ``axis``, each in the order of that axis."""
        along = axis.split("_")
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)._asdict()
            key = tuple(index for name, index in place.items() if name not in along)
            groups.setdefault(key, []).append(rank)
        return list(groups.values())
