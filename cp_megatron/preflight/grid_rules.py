"""The grid of ranks: the sizes of its axes, and whether a launch has the ranks for it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from functools import partial
from typing import Any

from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.config.fields import settings
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid
from cp_megatron.plan.grid import AXES
from cp_megatron.preflight.rules import multiples
from cp_megatron.spec import ModelSpec

REPLICAS = "--data-parallel-replicate-size"
_MOST_STATE = 16 * 2**30
_STATE_BYTES = 16
"""A parameter takes these bytes: weight, gradient and the two moments of Adam, each in float32."""


def plan_grid(
    config: Config,
    launch: Launch,
    dry_run: bool,
    world_size: int | None,
    command: Sequence[str],
    vocab_size: int | None,
) -> tuple[Grid, tuple[str, ...]]:
    """The grid over the ranks of this launch or of the dry run, and notes about its size.

    Args:
        config: the run.
        launch: how this process was started.
        dry_run: only the plan is shown.
        world_size: the number of ranks to plan a dry run for; None: as many as the launch has, or
            the smallest number that works.
        command: the program with its arguments.
        vocab_size: number of tokens the model knows; None if the model is not possible.

    Raises:
        ConfigError: the ranks cannot be divided over the axes.
    """
    sizes = {axis: getattr(config.parallel, name) for axis, name in AXES.items() if name}
    asked = config.parallel.data_parallel_replicate_size
    replicas = 1 if asked == "auto" else asked
    ep = config.parallel.expert_model_parallel_size
    smallest = Grid(dp=replicas, replicas=replicas, **sizes)
    inner = smallest.world_size
    grid = partial(_grid, smallest, ep)
    if world_size is not None:
        if world_size < 1:
            raise ConfigError("--world-size", world_size, "must be positive", str(inner))
        if world_size % inner:
            rule = f"must be divisible by {_axis_flags(smallest)} = {inner}"
            raise ConfigError("--world-size", world_size, rule, multiples(world_size, inner))
        return grid(world_size), ()
    if dry_run and not launch.under_torchrun:
        ranks = inner * math.lcm(smallest.copy_size, ep) // smallest.copy_size
        return grid(ranks), (f"no --world-size given: planned for {ranks}, the smallest world",)
    if launch.world_size % inner:
        raise _wrong_world(launch, smallest, command)
    found, notes = grid(launch.world_size), tuple[str, ...]()
    if asked == "auto" and vocab_size is not None and launch.nodes > 1:
        found, notes = _copies_on_nodes(config, found, launch, vocab_size)
    return found, notes


def _grid(smallest: Grid, ep: int, ranks: int) -> Grid:
    """The grid of so many ranks, whose other axes have the sizes of the smallest grid."""
    replicas, inner = smallest.replicas, smallest.world_size
    sizes: dict[str, Any] = smallest.sizes | {"dp": ranks * replicas // inner}
    if (copy := smallest.copy_size * ranks // inner) % ep:
        part = "a pipeline stage" if smallest.pp > 1 else "the model"
        rule = f"must divide {copy}, the number of ranks of a copy of {part}"
        more = inner * math.lcm(smallest.copy_size, ep) // smallest.copy_size
        works = f"{math.gcd(copy, ep)}, or {more} ranks"
        raise ConfigError("--expert-model-parallel-size", ep, rule, works)
    return Grid(replicas=replicas, ep=ep, **sizes)


def _copies_on_nodes(
    config: Config, grid: Grid, launch: Launch, vocab_size: int
) -> tuple[Grid, tuple[str, ...]]:
    """The grid with a copy of the model on each node, if it fits there; and a note that says why.

    Ranks of a node are neighbours, and so are those of a copy: a copy lies on one node if its ranks
    are as many as those of the node, which cp x tp divides.
    """
    on_node, ranks = launch.local_world_size, grid.world_size // grid.pp
    if on_node == 1 or ranks % on_node or ranks == on_node:
        return grid, ()  # no stage has several whole nodes, or a copy would not be sharded at all
    copies, refused = ranks // on_node, ""
    if on_node % (grid.cp * grid.tp):
        refused = f"{grid.cp * grid.tp} context and tensor parallel ranks do not divide its ranks"
    elif on_node % grid.ep:
        refused = f"{grid.ep} expert parallel ranks do not divide its ranks"
    else:
        sizes: dict[str, Any] = grid.sizes
        with_copies = Grid(replicas=copies, ep=grid.ep, **sizes)
        spec = ModelSpec.of(config.model, vocab_size=vocab_size, seq_length=config.data.seq_length)
        of_stage = Grid(replicas=copies, ep=grid.ep, **(sizes | {"pp": 1}))
        held = spec.parameters_on_rank(of_stage, 0) / grid.pp * _STATE_BYTES
        if held <= _MOST_STATE:
            of = "each pipeline stage" if grid.pp > 1 else "the model"
            note = f"{copies} copies of {of}, one on the {on_node} ranks of each node, so that"
            return with_copies, (f"{note} weights are gathered inside a node ({REPLICAS} auto)",)
        refused = f"its ranks would each hold {held / 2**30:,.0f} GiB of weights, gradients and "
        refused += f"optimizer state, above {_MOST_STATE // 2**30} GiB"
    note = f"weights are sharded over {copies} nodes, not copied to each: {refused}"
    return grid, (f"{note} ({REPLICAS} auto)",)


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
