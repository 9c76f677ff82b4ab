"""The process groups of a run, built once and passed as an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cp_megatron.plan import Coordinates, Grid


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """This rank's place on the grid and its process groups. A group may have one rank.

    ``groups["cp"]`` is this rank's group along an axis of the grid, along ``dp_cp`` or over the
    ``world``; those in common use are attributes as well.

    Attributes:
        grid: the sizes of the axes.
        coordinates: this rank's index on each of them.
        meshes: the 1-D mesh of each group, by the same names.
    """

    grid: Grid
    coordinates: Coordinates
    meshes: Mapping[str, DeviceMesh]

    @classmethod
    def create(
        cls, grid: Grid, device_type: str, timeout: timedelta | None = None
    ) -> ParallelGroups:
        """Builds the groups; collective over the default process group, which must exist.

        Args:
            grid: its world size is the default group's.
            device_type: ``cpu`` or ``cuda``.
            timeout: how long a rank waits for the others; by default that of the default group.
        """
        names, shape = tuple(grid.sizes), tuple(grid.sizes.values())
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        meshes = {name: mesh[name] for name in names}
        meshes["world"] = mesh._flatten("world")
        meshes["dp_cp"] = mesh["dp", "cp"]._flatten("dp_cp")
        if timeout is not None:
            for one in meshes.values():
                dist.distributed_c10d._set_pg_timeout(timeout, one.get_group())
        coordinates = grid.coordinates(dist.get_rank())
        return cls(grid=grid, coordinates=coordinates, meshes=meshes)

    def __getitem__(self, name: str) -> dist.ProcessGroup:
        return self.meshes[name].get_group()

    @property
    def tp(self) -> dist.ProcessGroup:
        """Ranks that share the weights."""
        return self["tp"]

    @property
    def cp(self) -> dist.ProcessGroup:
        """Ranks that share the sequence."""
        return self["cp"]

    @property
    def dp(self) -> dist.ProcessGroup:
        """Ranks that share the batch."""
        return self["dp"]

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        """Ranks that hold the same part of the weights and different tokens.

        Parameters, gradients and optimizer state are sharded over this group.
        """
        return self["dp_cp"]

    @property
    def world(self) -> dist.ProcessGroup:
        """All ranks, by number."""
        return self["world"]
