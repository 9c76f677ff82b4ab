"""The process groups of a run, built once and passed as an argument."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cp_megatron.plan import Coordinates, Grid


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """Where this rank stands and whom it talks to. Groups of one rank exist too.

    Attributes:
        grid: the sizes of the axes.
        coordinates: this rank's place on them.
        mesh: axes ``dp``, ``cp``, ``tp``; row-major, so tp is fastest.
        dp_cp_mesh: the flattened dp x cp axis, over which parameters are sharded.
        world_mesh: all axes flattened.
    """

    grid: Grid
    coordinates: Coordinates
    mesh: DeviceMesh
    dp_cp_mesh: DeviceMesh
    world_mesh: DeviceMesh

    @classmethod
    def create(
        cls, grid: Grid, device_type: str, timeout: timedelta | None = None
    ) -> ParallelGroups:
        """Builds the groups; collective over the default process group, which must exist.

        Args:
            grid: its world size is the default group's.
            device_type: ``cpu`` or ``cuda``.
            timeout: after which a rank no longer waits for the others; by default torch's, which
                new groups take whatever the default group's is.
        """
        mesh = init_device_mesh(
            device_type, (grid.dp, grid.cp, grid.tp), mesh_dim_names=("dp", "cp", "tp")
        )
        # Reductions over all ranks at once (the gradient's norm) then take one message instead of
        # one per axis: DTensor looks for a flattened mesh that covers both of a parameter's axes.
        world = mesh._flatten("world")
        dp_cp = mesh["dp", "cp"]._flatten("dp_cp")
        if timeout is not None:
            for group in (*mesh.get_all_groups(), world.get_group(), dp_cp.get_group()):
                dist.distributed_c10d._set_pg_timeout(timeout, group)
        return cls(
            grid=grid,
            coordinates=grid.coordinates(dist.get_rank()),
            mesh=mesh,
            dp_cp_mesh=dp_cp,
            world_mesh=world,
        )

    @property
    def tp_mesh(self) -> DeviceMesh:
        """The 1-D mesh of this rank's tensor parallel group."""
        return self.mesh["tp"]

    @property
    def tp(self) -> dist.ProcessGroup:
        """Ranks that share the weights."""
        return self.mesh.get_group("tp")

    @property
    def cp(self) -> dist.ProcessGroup:
        """Ranks that share the sequence."""
        return self.mesh.get_group("cp")

    @property
    def dp(self) -> dist.ProcessGroup:
        """Ranks that share the batch."""
        return self.mesh.get_group("dp")

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        """Ranks that hold the same part of the weights and different tokens."""
        return self.dp_cp_mesh.get_group()

    @property
    def world(self) -> dist.ProcessGroup:
        """All ranks, by number."""
        return self.world_mesh.get_group()
