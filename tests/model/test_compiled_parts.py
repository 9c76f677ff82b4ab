"""A model whose parts are compiled computes what it computes eagerly, on every grid."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import Config, MemoryConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.model import Transformer, build_model
from cp_megatron.model.compiled_parts import check_compiler, compile_parts
from cp_megatron.plan import Grid, Mask
from cp_megatron.tensor_parallel import LossRule
from tests.model.grids import LLAMA, ROWS, SEQ, STYLES, VOCAB, batch, full, run_config, worst
from tests.ranks import run_ranks

TOLERANCE = 1e-12
ALONE, FOUR = Grid(dp=1, cp=1, tp=1), Grid(dp=1, cp=2, tp=2)
TRACED = "aot_eager_decomp_partition"
"""A backend that does all but generate code, which takes the longest."""
DOCUMENTS = [[32, 32], [5, 27, 32], [13, 19, 32], [1, 1, 30, 20, 12]]
FULL = MemoryConfig(recompute_granularity="full")
MEMORY = {
    "none": MemoryConfig(),
    "selective": MemoryConfig(recompute_granularity="selective"),
    "full": FULL,
    "tiles": replace(FULL, mlp_tile_size=12),
}
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler"
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a rank found.

    Attributes:
        gaps: the largest relative error of a gradient, or of the loss, for each batch.
        graphs: the number of graphs compiled until the end of each batch.
        breaks: the reasons of graph breaks.
        names: whether parameters have the names that they had before.
    """

    gaps: list[float]
    graphs: list[int]
    breaks: list[str]
    names: bool


def gradients(model: Transformer, groups: ParallelGroups, lengths: list[int]) -> dict[str, Tensor]:
    """The gradients of a batch with these documents, and its loss among them."""
    cp = ContextParallel(groups.cp, Mask.documents(lengths), layout="zigzag")
    tokens, labels = (cp.shard(x.reshape(1, ROWS * SEQ), 1) for x in batch())
    trained, losses = model(tokens, cp=cp, labels=labels, rule=LossRule())
    trained.backward()
    found = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"loss": losses.sum().detach()}


def compare(rank: int, world_size: int, config: Config, grid: Grid, backend: str = TRACED) -> Found:
    """Batches with different documents, eager and compiled."""
    torch._dynamo.reset()
    counters.clear()
    groups = ParallelGroups.create(grid, "cpu")
    model = build_model(config, groups, vocab_size=VOCAB, dtype="float64", device="cpu")
    expected, names = [gradients(model, groups, x) for x in DOCUMENTS], list(model.state_dict())
    compile_parts(model, backend)
    gaps, graphs = list[float](), list[int]()
    for lengths, there in zip(DOCUMENTS, expected, strict=True):
        gaps.append(worst(gradients(model, groups, lengths), there)[0])
        graphs.append(counters["stats"]["unique_graphs"])
    same = names == list(model.state_dict())
    return Found(gaps=gaps, graphs=graphs, breaks=list(counters["graph_break"]), names=same)


def check(config: Config, grid: Grid, backend: str) -> None:
    for found in run_ranks(compare, grid.world_size, config, grid, backend, timeout=600.0):
        assert max(found.gaps) < TOLERANCE
        assert found.graphs[0] == found.graphs[-1] > 0
        assert not found.breaks
        assert found.names


def test_parts_compute_the_same_and_are_compiled_once_for_all_documents() -> None:
    check(run_config(LLAMA, memory=FULL), ALONE, TRACED)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("style", STYLES)
def test_every_style_on_a_grid(style: str, memory: str) -> None:
    check(run_config(STYLES[style], sequence_parallel=True, memory=MEMORY[memory]), FOUR, TRACED)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "memory", "grid"),
    [
        ("gpt", "none", ALONE),
        ("llama", "tiles", Grid(dp=1, cp=2, tp=1)),
        ("llama-tied", "selective", Grid(dp=1, cp=1, tp=2)),
        ("latent", "full", FOUR),
    ],
    ids=str,
)
def test_code_of_the_compiler(style: str, memory: str, grid: Grid) -> None:
    config = run_config(STYLES[style], sequence_parallel=True, memory=MEMORY[memory])
    check(config, grid, "inductor")


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ConfigError) as caught:
        check_compiler(torch.device("cpu"))
    assert str(caught.value).startswith(
        "--compile True: torch.compile fails on cpu: No working C++ compiler found (works: g++"
    )


@needs_compiler
@pytest.mark.slow
def test_the_trial_passes_where_there_is_a_compiler() -> None:
    torch._dynamo.reset()
    check_compiler(torch.device("cpu"))
