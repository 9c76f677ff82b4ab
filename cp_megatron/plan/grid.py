"""The grid of ranks over named axes: tensor parallel fastest, then context, data and pipeline.

World 8 as dp 2 x cp 2 x tp 2::

    rank = tp + TP * (cp + CP * dp)

              tp 0  tp 1
    dp 0 cp 0   0     1       tp groups  [0,1] [2,3] [4,5] [6,7]
         cp 1   2     3       cp groups  [0,2] [1,3] [4,6] [5,7]
    dp 1 cp 0   4     5       dp groups  [0,4] [1,5] [2,6] [3,7]
         cp 1   6     7       dp_cp      [0,2,4,6] [1,3,5,7]

Weights are sharded over dp_cp. With ``replicas`` the dp axis has two levels, and only the inner one
is sharded: every replica is a run of dp x cp that holds the whole model. With 2 of them above,
ranks 0-3 and 4-7 hold the same shards, those of [0,2] [1,3], and sum their gradients ([0,4] ..).

The ranks of a pipeline stage are a run of dp x cp x tp. With ``pp`` 2 before the axes above, there
are 16 ranks, and ranks 8-15 are the second stage. Everything said here then holds in each stage.

Experts are shared by ranks of another grid over the same ranks. With ``ep``, runs of that many
neighbours, in the order of ranks and within a replica, hold different experts; ``edp`` joins the
ranks of a replica that hold the same experts, over which these are sharded. With ep 4 above, ep
groups are [0,1,2,3] [4,5,6,7] and edp groups [0,4] [1,5] [2,6] [3,7].

Tensor parallel neighbours exchange the most data and therefore share a node. This is Megatron-LM's
order ``tp-cp-dp-pp``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

AXES: Mapping[str, str] = MappingProxyType(
    {
        "tp": "tensor_parallel_size",
        "cp": "context_parallel_size",
        "dp": "",
        "pp": "pipeline_parallel_size",
    }
)
"""The axes, fastest first, each with the setting that gives its size. The one axis without a
setting takes the ranks that the others leave."""
STAGE = "dp_cp_tp"
"""The axes of the ranks of one pipeline stage."""
_OF_EXPERTS = ("ep", "edp")


class _PerAxis:
    """One number for each axis, slowest axis first, read as an attribute: ``x.cp``."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self._numbers = dict(numbers)

    def __getattr__(self, axis: str) -> int:
        numbers: dict[str, int] = self.__dict__.get("_numbers", {})
        if axis not in numbers:
            raise AttributeError(f"there is no axis {axis}, only {', '.join(numbers)}")
        return numbers[axis]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(self._numbers.items()))

    def __repr__(self) -> str:
        numbers = ", ".join(f"{axis}={number}" for axis, number in self._numbers.items())
        return f"{type(self).__name__}({numbers})"


class Coordinates(_PerAxis):
    """A rank's index on every axis, e.g. ``coordinates.cp``."""

    def __init__(self, **indices: int) -> None:
        super().__init__(indices)

    def __str__(self) -> str:
        return "  ".join(f"{axis} {index}" for axis, index in self._numbers.items())

    def without(self, axis: str) -> Coordinates:
        """The indices on the other axes."""
        return Coordinates(**{name: n for name, n in self._numbers.items() if name != axis})


class Grid(_PerAxis):
    """The sizes of the axes, e.g. ``grid.cp``.

    Methods that take the name of an axis also take several, joined from the slowest on: ``dp_cp``
    is dp x cp as one axis. ``ep`` and ``edp`` are names as well, but no axes.

    Args:
        axes: the names of the axes, fastest first.
        replicas: copies of the sharded model along dp, whose size they divide.
        ep: ranks that share the experts; it divides the number of ranks of a replica of a stage.
        sizes: by axis; an axis that is not named has size 1.
    """

    def __init__(
        self, *, axes: Iterable[str] = AXES, replicas: int = 1, ep: int = 1, **sizes: int
    ) -> None:
        ones = dict.fromkeys(reversed(tuple(axes)), 1)
        if unknown := sizes.keys() - ones.keys():
            raise TypeError(f"there is no axis {', '.join(unknown)}, only {', '.join(ones)}")
        super().__init__(ones | sizes)
        assert self._numbers.get("dp", 1) % replicas == 0, f"{replicas} replicas on {self}"
        self.replicas, self.ep = replicas, ep
        assert self.copy_size % ep == 0, f"ep {ep} on {self}"

    def __str__(self) -> str:
        shown = {axis: n for axis, n in self._numbers.items() if axis != "pp" or n > 1}
        return " x ".join(f"{axis} {size}" for axis, size in shown.items())

    def __repr__(self) -> str:
        more = f" in {self.replicas} replicas" if self.replicas > 1 else ""
        return super().__repr__() + more + (f" with ep={self.ep}" if self.ep > 1 else "")

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by axis, the slowest first: the names and the shape of the mesh of ranks."""
        return dict(self._numbers)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self._numbers.values())

    @property
    def copy_size(self) -> int:
        """Number of ranks that hold one copy of a pipeline stage's layers."""
        return self.world_size // self._numbers.get("pp", 1) // self.replicas

    @property
    def shards(self) -> int:
        """Number of ranks over which the weights of a tensor parallel rank are sharded."""
        return self.size("dp_cp") // self.replicas

    def shard(self, rank: int) -> int:
        """Which of these shards ``rank`` holds."""
        return self.index("dp_cp", rank) % self.shards

    @property
    def expert_sizes(self) -> dict[str, int]:
        """Sizes of the grid of a stage's experts, the slowest first."""
        return {"replicas": self.replicas, "edp": self.copy_size // self.ep, "ep": self.ep}

    def size(self, name: str) -> int:
        """Number of ranks along an axis."""
        if name in _OF_EXPERTS:
            return self.expert_sizes[name]
        return math.prod(self._numbers[axis] for axis in name.split("_"))

    def index(self, name: str, rank: int) -> int:
        """The index of ``rank`` along an axis."""
        if name in _OF_EXPERTS:
            edp, ep = divmod(rank % self.copy_size, self.ep)
            return ep if name == "ep" else edp
        index, coordinates = 0, self.coordinates(rank)
        for axis in name.split("_"):
            index = index * self._numbers[axis] + getattr(coordinates, axis)
        return index

    def coordinates(self, rank: int) -> Coordinates:
        """The index of ``rank`` on every axis."""
        indices: dict[str, int] = {}
        for axis, size in reversed(self._numbers.items()):
            rank, indices[axis] = divmod(rank, size)
        return Coordinates(**dict(reversed(indices.items())))

    def place_of(self, rank: int) -> str:
        """The pipeline stage of a rank in words; empty if there is one stage."""
        return f"stage {self.index('pp', rank)}" if self._numbers.get("pp", 1) > 1 else ""

    def groups(self, name: str) -> list[list[int]]:
        """The groups of ranks along an axis, each in the order of that axis."""
        along = name.split("_")
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            if name in _OF_EXPERTS:
                key = rank // self.copy_size, self.index("edp" if name == "ep" else "ep", rank)
            else:
                place = self.coordinates(rank)
                key = tuple(getattr(place, axis) for axis in self._numbers if axis not in along)
            groups.setdefault(key, []).append(rank)
        return list(groups.values())
