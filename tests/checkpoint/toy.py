"""A small model with every kind of tensor that a checkpoint stores, on any grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.manifest import Manifest
from cp_megatron.checkpoint.save import start_save
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import Config
from cp_megatron.plan import Grid
from cp_megatron.spec import ParameterSpec
from cp_megatron.tensor_parallel import place

Split = dict[str, int]
ROWS: Split = {"tp": 0}
COLUMNS: Split = {"tp": 1}
WHOLE: Split = {}
PARAMETERS: dict[str, tuple[tuple[int, ...], Split]] = {
    "column": ((12, 6), ROWS),
    "row": ((6, 12), COLUMNS),
    "bias": ((8,), ROWS),
    "norm": ((5,), WHOLE),  # over four ranks: 2 2 1 0
    "one": ((1,), WHOLE),
    "kv": ((3, 2, 2), WHOLE),
}


def save_checkpoint(folder: Path | str, **arguments: Any) -> Path:
    """Saves, and returns when the checkpoint is complete."""
    return start_save(folder, background=False, **arguments).wait()


class Toy(nn.Module):
    """Has parameters, a tied one, a persistent buffer and one that is not persistent."""

    def __init__(self, groups: ParallelGroups | None, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, (shape, split) in PARAMETERS.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if groups is not None:
                spec = ParameterSpec(name=name, shape=shape, init="zeros", split=split)
                value = place(value, spec, groups.meshes["tp"], "cpu")
            self.register_parameter(name, nn.Parameter(value))
        self.tied = self.column
        self.register_buffer("count", torch.tensor([3, 4]))
        self.register_buffer("cache", torch.tensor([1.0]), persistent=False)


def make(
    grid: Grid | None, *, dtype: torch.dtype = torch.float32, updates: int = 0
) -> tuple[Toy, torch.optim.AdamW]:
    """Makes the model and its optimizer; the updates do not depend on the grid.

    Args:
        grid: None makes a plain module of this process.
        dtype: the dtype of the parameters.
        updates: the number of updates.
    """
    groups = None if grid is None else ParallelGroups.create(grid, "cpu")
    model = Toy(groups, dtype)
    if groups is not None:
        fully_shard(model, mesh=groups.meshes["dp_cp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    update(model, optimizer, updates)
    return model, optimizer


def update(model: Toy, optimizer: torch.optim.AdamW, updates: int) -> None:
    """Updates with elementwise gradients, so that every grid computes the same bits."""
    for _ in range(updates):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5 + 1
        optimizer.step()


def scramble(model: Toy, optimizer: torch.optim.AdamW) -> None:
    """Destroys all values, so that values that are right after a load are loaded ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(99)
        model.count.fill_(99)
    optimizer.state.clear()


def snapshot(model: Toy, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Returns the whole tensors of both, on every rank."""
    found: dict[str, Tensor] = {"count": model.count.clone()}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = whole(value)
    return found


def whole(tensor: Tensor) -> Tensor:
    """Returns a copy of the global tensor."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def save(
    folder: Path,
    model: Toy,
    optimizer: torch.optim.AdamW | None,
    *,
    grid: Grid | None = None,
    step: int = 3,
) -> Path:
    """Saves with arbitrary values for the manifest."""
    return save_checkpoint(
        folder,
        step=step,
        consumed=24,
        model=model,
        optimizer=optimizer,
        config=Config(),
        grid=grid or Grid(),
        data_fingerprint="abc",
        vocab_size=257,
    )


def save_on_ranks(rank: int, world_size: int, grid: Grid, folder: Path) -> dict[str, Tensor]:
    """Saves after three updates; returns what was saved. For ``run_ranks``."""
    model, optimizer = make(grid, updates=3)
    save(folder, model, optimizer, grid=grid)
    return snapshot(model, optimizer)


def load_on_ranks(
    rank: int, world_size: int, grid: Grid | None, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], Manifest]:
    """Returns what was loaded, its values after another update, and the manifest."""
    model, optimizer = make(grid, updates=1)
    scramble(model, optimizer)
    manifest = load_checkpoint(folder, model=model, optimizer=optimizer)
    loaded = snapshot(model, optimizer)
    update(model, optimizer, 1)
    return loaded, snapshot(model, optimizer), manifest
