"""The process groups of a run, built once and passed as an argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cp_megatron.plan import Coordinates, Grid
from cp_megatron.plan.grid import STAGE
from cp_megatron.plan.pipeline import KINDS, Channel


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """This rank's place on the grid and its process groups. A group may have one rank.

    ``groups["cp"]`` is this rank's group along an axis of the grid, along ``dp_cp``, over the ranks
    of its pipeline stage (``STAGE``) or over the ``world``; those in common use are attributes as
    well.

    Attributes:
        grid: the sizes of the axes.
        coordinates: this rank's index on each of them.
        meshes: the 1-D mesh of each group, by the same names.
        sharding: the mesh of ``dp_cp``; 2-D, with a replica's ranks as the last dim, if there are
            several replicas. Parameters, gradients and optimizer state are sharded over its last
            dim.
        expert_sharding: the same for experts, over ``edp``; None if there are no experts. Then
            there are also no groups ``ep``, ``edp`` and ``cp_tp``, the ranks that share rows.
        channels: between the stages of a pipeline, a group for each channel of messages.
        ends: the first and the last stage of a pipeline; None if there is one stage.
    """

    grid: Grid
    coordinates: Coordinates
    meshes: Mapping[str, DeviceMesh]
    sharding: DeviceMesh
    expert_sharding: DeviceMesh | None = None
    channels: Mapping[Channel, dist.ProcessGroup] = field(default_factory=dict)
    ends: dist.ProcessGroup | None = None

    @classmethod
    def create(
        cls,
        grid: Grid,
        device_type: str,
        timeout: timedelta | None = None,
        *,
        has_experts: bool = False,
    ) -> ParallelGroups:
        """Builds the groups; collective over the default process group, which must exist.

        Args:
            grid: its world size is the default group's.
            device_type: ``cpu`` or ``cuda``.
            timeout: how long a rank waits for the others; by default as long as torch lets it.
            has_experts: build the groups of experts too.
        """
        if timeout is not None:
            with _timeout_of_new_groups(timeout):
                return cls.create(grid, device_type, has_experts=has_experts)
        mesh = _whole_mesh(grid, device_type)
        meshes = {name: mesh[name] for name in grid.sizes if name != "dp"}
        meshes["world"] = mesh._flatten("world")
        inner = [name for name in mesh.mesh_dim_names or () if name != "pp"]
        meshes[STAGE] = meshes["world"] if grid.pp == 1 else mesh[tuple(inner)]._flatten(STAGE)
        if grid.replicas == 1:
            meshes["dp"] = mesh["dp"]
            meshes["dp_cp"] = sharding = mesh["dp", "cp"]._flatten("dp_cp")
        else:
            meshes["dp"] = mesh["replicas", "in_replica"]._flatten("dp")
            meshes["dp_cp"] = mesh["replicas", "in_replica", "cp"]._flatten("dp_cp")
            mesh["in_replica", "cp"]._flatten("shards")
            sharding = mesh["replicas", "shards"]
        expert_sharding = None
        if has_experts or grid.ep > 1:
            expert_sharding = _add_experts(meshes, mesh, grid, device_type)
        channels, ends = _pipeline_groups(grid)
        return cls(
            grid=grid,
            coordinates=grid.coordinates(dist.get_rank()),
            meshes=meshes,
            sharding=sharding,
            expert_sharding=expert_sharding,
            channels=channels,
            ends=ends,
        )

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
        """Ranks that have different tokens, and the same part of the weights over tp."""
        return self["dp_cp"]

    @property
    def stage(self) -> dist.ProcessGroup:
        """The ranks of this pipeline stage."""
        return self[STAGE]

    @property
    def world(self) -> dist.ProcessGroup:
        """All ranks, by number."""
        return self["world"]


@contextmanager
def _timeout_of_new_groups(timeout: timedelta) -> Iterator[None]:
    """Makes this the timeout of groups that are made without one, as those of a mesh are.

    To change it later is too late: gloo's messages from rank to rank keep the one of their group's
    beginning.
    """
    torch_groups, names = dist.distributed_c10d, ("default_pg_timeout", "default_pg_nccl_timeout")
    held = {name: getattr(torch_groups, name) for name in names}
    try:
        for name in names:
            setattr(torch_groups, name, timeout)
        yield
    finally:
        for name, value in held.items():
            setattr(torch_groups, name, value)


def _whole_mesh(grid: Grid, device_type: str) -> DeviceMesh:
    """The mesh of all ranks; with replicas, dp is two dims, replicas and in_replica."""
    sizes: dict[str, int] = {}
    for name, size in grid.sizes.items():
        if name == "dp" and grid.replicas > 1:
            sizes |= {"replicas": grid.replicas, "in_replica": size // grid.replicas}
        else:
            sizes[name] = size
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _add_experts(
    meshes: dict[str, DeviceMesh], mesh: DeviceMesh, grid: Grid, device_type: str
) -> DeviceMesh:
    """Adds the groups of experts to ``meshes``; returns the mesh that experts are sharded over."""
    # FSDP may take a mesh of three dims for one with replicas.
    sizes = {"pp": grid.pp} if grid.pp > 1 else {}
    sizes |= {name: n for name, n in grid.expert_sizes.items() if name != "replicas" or n > 1}
    own = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    meshes |= {"ep": own["ep"], "edp": own["edp"]}
    meshes["cp_tp"] = mesh["cp", "tp"]._flatten("cp_tp")
    return own["edp"] if grid.replicas == 1 else own["replicas", "edp"]


def _pipeline_groups(
    grid: Grid,
) -> tuple[dict[Channel, dist.ProcessGroup], dist.ProcessGroup | None]:
    """The channels between the stages of this rank's pipeline, and its two ends."""
    if grid.pp == 1:
        return {}, None
    pipelines = grid.groups("pp")
    channels: dict[Channel, dist.ProcessGroup] = {}
    for kind in KINDS:
        for wraps in (False, True):
            group = _own_group(pipelines)
            assert group is not None, "each rank is in a pipeline"
            channels[Channel(kind, wraps)] = group
    return channels, _own_group([[ranks[0], ranks[-1]] for ranks in pipelines])


def _own_group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Builds a group of each; returns that of this rank, None if it is in none. Collective."""
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            own = group
    return own
