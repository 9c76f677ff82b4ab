"""The grid of ranks: the sizes of its axes, and whether a launch has the ranks for it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.config.fields import settings
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid
from cp_megatron.plan.grid import AXES
from cp_megatron.preflight.rules import multiples


def plan_grid(
    config: Config, launch: Launch, dry_run: bool, world_size: int | None, command: Sequence[str]
) -> tuple[Grid, tuple[str, ...]]:
    """The grid over the ranks of this launch or of the dry run, and a note about its size."""
    sizes = {axis: getattr(config.parallel, name) for axis, name in AXES.items() if name}
    replicas = config.parallel.data_parallel_replicate_size
    ep = config.parallel.expert_model_parallel_size
    smallest = Grid(dp=replicas, replicas=replicas, **sizes)
    inner = smallest.world_size

    def grid(ranks: int) -> Grid:
        if (copy := ranks // replicas) % ep:
            rule = f"must divide {copy}, the number of ranks of a copy of the model"
            works = f"{math.gcd(copy, ep)}, or {math.lcm(inner // replicas, ep) * replicas} ranks"
            raise ConfigError("--expert-model-parallel-size", ep, rule, works)
        return Grid(dp=ranks * replicas // inner, replicas=replicas, ep=ep, **sizes)

    if world_size is not None:
        if world_size < 1:
            raise ConfigError("--world-size", world_size, "must be positive", str(inner))
        if world_size % inner:
            rule = f"must be divisible by {_axis_flags(smallest)} = {inner}"
            raise ConfigError("--world-size", world_size, rule, multiples(world_size, inner))
        return grid(world_size), ()
    if dry_run and not launch.under_torchrun:
        ranks = math.lcm(inner // replicas, ep) * replicas
        return grid(ranks), (f"no --world-size given: planned for {ranks}, the smallest world",)
    if launch.world_size % inner:
        raise _wrong_world(launch, smallest, command)
    return grid(launch.world_size), ()


def _axis_flags(smallest: Grid) -> str:
    """The flags that give the axes of the smallest grid their sizes, the slowest first."""
    of_dp = "data_parallel_replicate_size"
    sizes = {AXES[axis] or of_dp: size for axis, size in smallest.sizes.items() if size > 1}
    return " x ".join(f"{settings()[name].flag} {size}" for name, size in sizes.items())


def _wrong_world(launch: Launch, smallest: Grid, command: Sequence[str]) -> ConfigError:
    """The error for a world that the grid does not divide, with a whole command that works."""
    inner, world = smallest.world_size, launch.world_size
    started = "torchrun started" if launch.under_torchrun else "plain python starts"
    rule = f"needs a multiple of {inner} ranks, but {started} {world}"
    flag, _, value = _axis_flags(smallest).rpartition(" ")
    ranks = max(inner, world // inner * inner)
    works = shlex.join(["torchrun", "--nproc-per-node", str(ranks), *command])
    if launch.nodes > 1:
        works = f"{multiples(world, inner)} ranks over all nodes"
    return ConfigError(flag, value, rule, works)
