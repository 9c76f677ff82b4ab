"""Runs a family's tiny model in the trainer, on a grid of ranks of the test pool.

The trainer is assembled from a command line, as the program does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cp_megatron.checkpoint.hf_export import export_hf
from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.plan import Grid
from tests.checkpoint.toy import save_checkpoint, whole
from tests.families.case import VOCAB
from tests.families.tiny_models import LENGTHS, SEQ, batch, tensors_of
from tests.ranks import run_ranks
from tests.train.test_loop import assembled

STEPS = 20
ROWS = 2  # of a global batch
LONG_FIRST = (29, 2, 17)  # the documents of every second row


@dataclass(frozen=True, kw_only=True)
class Computed:
    """One row's logits [1, SEQ, VOCAB], mean loss, and gradients by our names (on rank 0)."""

    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def argv(folder: Path, target: Path, grid: Grid, dtype: str) -> list[str]:
    """The command line of a run in ``target`` from the folder; tests replace its data."""
    text = target / "text.txt"
    text.write_text("three blind mice " * 100)
    flags = {
        "load-hf": folder,
        "data-path": text,
        "save": target / "run",
        "seq-length": SEQ,
        "micro-batch-size": 1,
        "global-batch-size": ROWS,
        "train-iters": STEPS,
        "tensor-parallel-size": grid.tp,
        "context-parallel-size": grid.cp,
        "expert-model-parallel-size": grid.ep,
        "dtype": dtype,
        "hidden-dropout": 0,
        "attention-dropout": 0,
        "eval-iters": 0,
        "lr-warmup-iters": 0,
        "device": "cpu",
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [*words, "--document-mask", *(["--sequence-parallel"] if grid.tp > 1 else [])]


def compute(rank: int, world_size: int, words: list[str], target: Path) -> Computed:
    """Runs forward and backward; saves the model as step 1 and its gradients as step 2."""
    run = assembled(rank, world_size, words)
    step, model = run.train_step, run.train_step.model
    shard = step.prepare(batch(model.config.row_window))
    with torch.no_grad():
        logits = model.eval()(shard.tokens, cp=shard.cp)
    logits = shard.cp.gather(all_gather_dim(logits, -1, step.groups.tp), 1)
    assert logits[..., VOCAB:].eq(float("-inf")).all()
    gradients: dict[str, Tensor] = {}

    def keep(loss: Tensor, norm: Tensor) -> Tensor:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.clone()
        return torch.zeros_like(loss, dtype=torch.bool)

    result = step.run([shard], step=1, lr=0.0, accept=keep)
    for number in (1, 2):
        save_checkpoint(
            target / f"{number}",
            step=number,
            consumed=0,
            model=model,
            optimizer=None,
            config=run.plan.config,
            grid=run.plan.grid,
            data_fingerprint="",
            vocab_size=VOCAB,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(gradients[name])
    full = {name: whole(gradient) for name, gradient in gradients.items()}
    return Computed(logits=logits[..., :VOCAB], loss=result.loss, gradients={} if rank else full)


def compute_on(grid: Grid, folder: Path, target: Path, dtype: str) -> list[Computed]:
    """``compute`` on every rank of the grid."""
    target.mkdir(exist_ok=True)
    return run_ranks(compute, grid.world_size, argv(folder, target, grid, dtype), target)


def gradient_gap(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative L2 error of a tensor, and its name.

    A gradient that is zero but for rounding (softmax ignores a key bias without positions) is
    measured against 1e-3 of the norm of all gradients. A NaN counts as infinite, because ``max``
    may pass over it.
    """
    assert found.keys() == expected.keys()
    least = 1e-3 * torch.stack([x.norm() for x in expected.values()]).norm()
    gaps = {key: (found[key] - x).norm() for key, x in expected.items()}
    return max(
        (float(gap.nan_to_num(nan=torch.inf) / torch.maximum(expected[key].norm(), least)), key)
        for key, gap in gaps.items()
    )


def logit_gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def exported_gradients(target: Path) -> dict[str, Tensor]:
    """The gradients that ``compute`` saved, by the names of the folder."""
    return tensors_of(export_hf(target / "2", target / "gradients"))


def train(rank: int, world_size: int, words: list[str], steps: int) -> dict[str, Tensor]:
    """Returns all parameters after the steps, on rank 0. Rows and their documents differ."""
    run = assembled(rank, world_size, words)
    step, dp = run.train_step, run.train_step.groups.coordinates.dp
    window, own = step.model.config.row_window, ROWS // step.groups.grid.dp
    for number in range(steps):
        first = number * ROWS + dp * own
        rows = [(row, LONG_FIRST if row % 2 else LENGTHS) for row in range(first, first + own)]
        shards = [step.prepare(batch(window, *row)) for row in rows]
        step.run(shards, step=number + 1, lr=3e-3)
    found = {name: whole(p) for name, p in step.model.named_parameters()}
    return found if rank == 0 else {}
