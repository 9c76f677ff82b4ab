"""Several ranks on one GPU: the engine with its CUDA kernels, and whole training steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cp_megatron.config import MemoryConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.plan import Grid, Mask
from tests.gpu import staged
from tests.model.grids import STYLES, loss_step, plain_step, run_config, worst
from tests.oracles import attention_inputs, dense_gradients, relative_error
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MASKS = {
    "causal": Mask.causal(768),
    "full": Mask.full(768),
    "documents": Mask.documents([1, 7, 421, 2, 205, 131, 1]),
    "window": Mask.causal(768, window=(101, 0)),
}


def on_gpu(rank: int, world_size: int, store: str, job: Callable[..., Any], *args: object) -> Any:
    """Runs ``job`` with a default group that sends CUDA tensors."""
    if dist.is_initialized():
        dist.destroy_process_group()
    staged.join(store, rank, world_size)
    try:
        return job(rank, world_size, *args)
    finally:
        dist.destroy_process_group()


def attend(
    rank: int, world_size: int, mask: Mask, dtype: torch.dtype, options: dict[str, str]
) -> dict[str, float]:
    """One rank's relative errors against dense attention in float64."""
    inputs = attention_inputs(7, 1, mask.seq_len, 8, 2, 64, 64)
    inputs = [x.to(dtype).to(torch.float64) for x in inputs]
    expected = dense_gradients(inputs, mask)
    cp = ContextParallel(dist.group.WORLD, mask, **options)
    q, k, v, dout = (cp.shard(x, 1).to(DEVICE, dtype) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    for _ in range(2):  # the second pass reuses the buffers of the first
        q.grad = k.grad = v.grad = None
        out = cp.attention(q, k, v)
        out.backward(dout)
    found: dict[str, Any] = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {
        name: relative_error(x.cpu(), expected[name], cp.positions.cpu(), 4)
        for name, x in found.items()
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("exchange", ["p2p", "all_gather", "a2a"])
def test_attention_in_bfloat16(num_ranks: int, exchange: str, tmp_path: Path) -> None:
    if exchange == "a2a" and num_ranks == 4:
        exchange = "a2a+p2p"  # two key/value heads
    for name, mask in MASKS.items():
        options = {"kernel": "cuda", "exchange": exchange if num_ranks > 1 else "auto"}
        if exchange == "a2a+p2p":
            options["hierarchical_sizes"] = (2, 2)
        args = (str(tmp_path / name), attend, mask, torch.bfloat16, options)
        for found in run_ranks(on_gpu, num_ranks, *args, timeout=120):
            assert max(found.values()) < 0.01, (name, found)


OPTIONS = {
    "plain": MemoryConfig(),
    "selective, tiles": MemoryConfig(mlp_tile_size=6, recompute_granularity="selective"),
    "everything": MemoryConfig(
        recompute_granularity="full", mlp_tile_size=4, loss_chunk_size=5, cpu_offloading=True
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 4)], ids=str)
def test_float64_gradients_are_those_of_one_process_on_the_cpu(
    grid: tuple[int, int, int], option: str, tmp_path: Path
) -> None:
    dp, cp, tp = grid
    config = run_config(STYLES["llama"], sequence_parallel=tp > 1, memory=OPTIONS[option])
    args = (str(tmp_path / "store"), loss_step, config, Grid(dp=dp, cp=cp, tp=tp), DEVICE)
    step = run_ranks(on_gpu, dp * cp * tp, *args, timeout=120)[0]
    expected = plain_step(config)
    assert step.loss == pytest.approx(expected.loss, rel=1e-12)
    gradients = {name: x.cpu() for name, x in step.gradients.items()}
    gap, name = worst(gradients, expected.gradients)
    assert gap < 1e-12, name
