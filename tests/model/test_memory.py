"""Tests that the memory options change no number on any grid, and compute nothing twice."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import MemoryConfig, ModelConfig
from cp_megatron.config.schema import Recompute
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.model import Transformer, build_model
from cp_megatron.model.offload import LayerOffload
from cp_megatron.plan import Grid, Mask
from cp_megatron.tensor_parallel import LossRule
from tests.allocations import counting_memory, kept_bytes
from tests.model.grids import (
    LLAMA,
    RECURRENT,
    SEQ,
    STYLES,
    VOCAB,
    Step,
    batch,
    loss_step,
    plain_step,
    run_config,
    worst,
)
from tests.ranks import run_ranks

TOLERANCE = 1e-12
OPTIONS = {
    "selective": MemoryConfig(recompute_granularity="selective"),
    "full": MemoryConfig(recompute_granularity="full"),
    "first layer": MemoryConfig(recompute_granularity="full", recompute_num_layers=1),
    "full, attention kept": MemoryConfig(
        recompute_granularity="full", recompute_keeps_attention=True, cpu_offloading=True
    ),
    "tiles": MemoryConfig(mlp_tile_size=6),
    "tiles, selective": MemoryConfig(mlp_tile_size=6, recompute_granularity="selective"),
    "tiles, full": MemoryConfig(mlp_tile_size=6, recompute_granularity="full"),
    "everything": MemoryConfig(
        recompute_granularity="full",
        mlp_tile_size=4,
        loss_chunk_size=5,
        cpu_offloading=True,
        optimizer_cpu_offload=True,
    ),
}


@functools.cache
def oracle(style: str) -> Step:
    return plain_step(run_config(STYLES[style]))


@pytest.mark.parametrize(
    ("style", "grid", "option"),
    [
        *(("llama-tied", (1, 2, 2), option) for option in OPTIONS),
        ("gpt", (1, 2, 2), "everything"),
        *(
            pytest.param(style, grid, option, marks=pytest.mark.slow)
            for style, grid, option in [
                *(("gpt", (1, 2, 2), option) for option in OPTIONS if option != "everything"),
                *(("gpt", grid, "everything") for grid in ((1, 1, 1), (2, 2, 1), (1, 1, 4))),
                *(("llama-tied", grid, "everything") for grid in ((1, 1, 1), (2, 2, 1), (1, 1, 4))),
                *((style, (1, 1, 1), "tiles") for style in ("gpt", "llama-tied")),
            ]
        ),
    ],
)
def test_gradients_are_those_of_one_process(
    style: str, grid: tuple[int, int, int], option: str
) -> None:
    dp, cp, tp = grid
    config = run_config(STYLES[style], sequence_parallel=tp > 1, memory=OPTIONS[option])
    step = run_ranks(loss_step, dp * cp * tp, config, Grid(dp=dp, cp=cp, tp=tp))[0]
    expected = oracle(style)
    assert step.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    gap, name = worst(step.gradients, expected.gradients)
    assert gap < TOLERANCE, name


@pytest.mark.parametrize("option", ["tiles, full", "everything"])
def test_without_sequence_parallelism(option: str) -> None:
    config = run_config(STYLES["mixed"], memory=OPTIONS[option])
    step = run_ranks(loss_step, 4, config, Grid(dp=1, cp=2, tp=2))[0]
    gap, name = worst(step.gradients, oracle("mixed").gradients)
    assert gap < TOLERANCE, name


def own_tiles(rank: int, world_size: int) -> Step | None:
    """A step in which every rank has another tile size, and rank 1 no tiles."""
    sizes = [2, None, 7, 100]
    memory = MemoryConfig(mlp_tile_size=sizes[rank], recompute_granularity="full")
    config = run_config(LLAMA, memory=memory)
    return loss_step(rank, world_size, config, Grid(dp=2, cp=2, tp=1))


def test_ranks_may_have_different_numbers_of_tiles() -> None:
    step = run_ranks(own_tiles, 4)[0]
    gap, name = worst(step.gradients, oracle("llama").gradients)
    assert gap < TOLERANCE, name


def counted(
    rank: int, world_size: int, memory: MemoryConfig, exchange: str, model: ModelConfig = LLAMA
) -> Counter[str]:
    """Messages of the cp group and FLOPs of a step on CP 2."""
    groups = ParallelGroups.create(Grid(dp=1, cp=2, tp=1), "cpu")
    config = run_config(model, memory=memory)
    built = build_model(config, groups, vocab_size=VOCAB, dtype="float64", device="cpu")
    cp = ContextParallel(groups.cp, Mask.causal(SEQ), exchange=exchange, check_ranks="never")
    tokens, labels = (cp.shard(x, 1) for x in batch())
    found: Counter[str] = Counter()
    with _Work(found):
        trained, _ = built(tokens, cp=cp, labels=labels, rule=LossRule())
        trained.backward()
    return found


class _Work(TorchDispatchMode):
    """Counts FLOPs of products, tiles of attention in forward, and attention's messages: sends and
    all-to-alls."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        if name.startswith("c10d.") and any(part in name for part in ("send", "alltoall")):
            self.found["messages"] += 1
        if "flash_attention" in name and "backward" not in name:
            self.found["attention"] += 1
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket]
            self.found["flops"] += flops(*args, **(kwargs or {}), out_val=out)
        return out


def test_recurrences_send_nothing_twice() -> None:
    """Neither their states nor the tokens that convolutions read."""
    model = replace(RECURRENT, num_layers=2, linear_attention_layers=(0, 1))
    plain, selective, full = (
        run_ranks(counted, 2, MemoryConfig(recompute_granularity=level), "auto", model)
        for level in ("none", "selective", "full")
    )
    for a, b, c in zip(plain, selective, full, strict=True):
        assert a["messages"] == b["messages"] == c["messages"] > 0
        assert a["flops"] < b["flops"]
        assert a["flops"] < c["flops"]


@pytest.mark.parametrize("exchange", ["p2p", "a2a"])
def test_kept_attention_is_neither_computed_nor_sent_twice(exchange: str) -> None:
    selective, full = (MemoryConfig(recompute_granularity=x) for x in ("selective", "full"))
    keeping = replace(full, recompute_keeps_attention=True)
    found = [
        run_ranks(counted, 2, memory, exchange)
        for memory in (MemoryConfig(), selective, full, keeping)
    ]
    for a, b, c, d in zip(*found, strict=True):
        assert 0 < a["messages"] == b["messages"] == d["messages"] < c["messages"]
        assert a["flops"] < b["flops"] < d["flops"] == c["flops"]
        assert 0 < a["attention"] == b["attention"] == d["attention"] < c["attention"]


def test_tiles_compute_nothing_more_than_without() -> None:
    for level in ("none", "selective", "full"):
        memory = MemoryConfig(recompute_granularity=level)
        whole = run_ranks(counted, 2, memory, "p2p")
        tiled = run_ranks(counted, 2, replace(memory, mlp_tile_size=4), "p2p")
        assert [found["flops"] for found in whole] == [found["flops"] for found in tiled]


def kept(memory: MemoryConfig, num_layers: int) -> int:
    """Bytes that autograd keeps of a step on one rank for backward, weights not counted."""
    config = replace(LLAMA, num_layers=num_layers)
    model = Transformer(
        config, seq_length=SEQ, vocab_size=VOCAB, tp=None, sequence_parallel=False, memory=memory
    ).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    cp = ContextParallel(None, Mask.causal(SEQ), kernel="reference")
    return kept_bytes(model, partial(loss_of, model, cp))


def loss_of(model: Transformer, cp: ContextParallel) -> Tensor:
    tokens, labels = (cp.shard(x, 1) for x in batch())
    trained, _ = model(tokens, cp=cp, labels=labels)
    return trained


def test_full_recomputation_keeps_one_tensor_of_a_layer() -> None:
    one_tensor = batch()[0].numel() * LLAMA.hidden_size * 8
    for options in ({}, {"mlp_tile_size": 5}):
        memory = MemoryConfig(recompute_granularity="full", **options)
        assert kept(memory, 5) - kept(memory, 2) == 3 * one_tensor
        memory = replace(memory, cpu_offloading=True)
        assert kept(memory, 5) == kept(memory, 2)


def kept_on_rank(rank: int, world_size: int, grid: Grid, memory: MemoryConfig) -> int:
    """Bytes that autograd keeps of two more layers, at the end of forward, on this rank."""
    groups = ParallelGroups.create(grid, "cpu")
    # a2a keeps the result of attention twice: by heads and, after the exchange back, by tokens.
    cp = ContextParallel(groups.cp, Mask.causal(SEQ), exchange="p2p")
    found = []
    for num_layers in (1, 3):
        model = replace(LLAMA, num_layers=num_layers, num_query_groups=4)
        config = run_config(model, sequence_parallel=True, memory=memory)
        built = build_model(config, groups, vocab_size=VOCAB, dtype="float32", device="cpu")
        found.append(kept_bytes(built, partial(loss_of, built, cp)))
    return found[1] - found[0]


@pytest.mark.parametrize(
    "level", ["full", *(pytest.param(x, marks=pytest.mark.slow) for x in ("none", "selective"))]
)
def test_ranks_share_what_a_layer_keeps(level: Recompute) -> None:
    """With sequence parallelism nothing is kept twice: gathered rows are gathered again."""
    memory = MemoryConfig(recompute_granularity=level)
    (alone,) = run_ranks(kept_on_rank, 1, Grid(dp=1, cp=1, tp=1), memory)
    for grid in (Grid(dp=1, cp=2, tp=2), Grid(dp=1, cp=1, tp=4), Grid(dp=1, cp=4, tp=1)):
        for share in run_ranks(kept_on_rank, 4, grid, memory):
            assert share == pytest.approx(alone / 4, rel=0.03)


def test_some_layers_alone_are_recomputed() -> None:
    none, full = MemoryConfig(), MemoryConfig(recompute_granularity="full")
    three, four = (replace(full, recompute_num_layers=number) for number in (3, 4))
    layer, recomputed = (kept(memory, 5) - kept(memory, 4) for memory in (none, full))
    assert kept(three, 6) - kept(three, 5) == layer
    assert kept(four, 6) - kept(three, 5) == recomputed


def test_offloaded_memory_is_used_again_and_given_back() -> None:
    memory = MemoryConfig(recompute_granularity="full", cpu_offloading=True)
    model = Transformer(
        LLAMA, seq_length=SEQ, vocab_size=VOCAB, tp=None, sequence_parallel=False, memory=memory
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens, labels = batch()
    cp = ContextParallel(None, Mask.causal(SEQ), kernel="reference")
    one_tensor = tokens.numel() * LLAMA.hidden_size * 4
    assert model.offload is not None
    for _ in range(3):
        trained, _ = model(tokens, cp=cp, labels=labels)
        assert model.offload.held_bytes == LLAMA.num_layers * one_tensor
        trained.backward()
        del trained
        assert model.offload.held_bytes == 0
        assert model.offload.host_bytes == LLAMA.num_layers * one_tensor
    model(tokens, cp=cp, labels=labels)  # never differentiated
    assert model.offload.held_bytes == 0


def test_without_a_stream_no_tensor_comes_back_before_it_is_read() -> None:
    """A copy on the CPU overlaps with nothing, so fetching ahead would only hold memory longer."""
    given = [torch.full((64, 64), float(number), requires_grad=True) for number in range(3)]
    offload = LayerOffload()
    with offload.hooks():
        results = [x.square() for x in given]
    for x, result in zip(reversed(given), reversed(results)):
        with counting_memory() as count:
            found = result.grad_fn._saved_self
        assert torch.equal(found, x)
        assert count.allocations == (found.nbytes,)


def test_every_option_is_one_of_the_configuration() -> None:
    assert set(asdict(MemoryConfig())) == {
        *("recompute_granularity", "recompute_num_layers", "mlp_tile_size", "loss_chunk_size"),
        "recompute_keeps_attention",
        *("cpu_offloading", "optimizer_cpu_offload", "memory_report"),
    }
