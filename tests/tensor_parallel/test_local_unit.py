"""Without FSDP a model computes the same bits as with it, on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import MemoryConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.model import build_model
from cp_megatron.model.parallelize import ComputeDType
from cp_megatron.plan import Grid, Mask
from tests.model.grids import LLAMA, RECURRENT, SEQ, VOCAB, batch, full, run_config
from tests.ranks import run_ranks

MEMORY = {
    "all": MemoryConfig(),
    "selective": MemoryConfig(recompute_granularity="selective"),
    "full": MemoryConfig(recompute_granularity="full"),
    "tiles": MemoryConfig(mlp_tile_size=8),
}


def gradients(
    rank: int, world_size: int, model: str, dtype: ComputeDType, memory: MemoryConfig
) -> tuple[bool, dict[str, Tensor]]:
    """Losses and gradients of two micro batches, and whether FSDP holds the weights."""
    groups = ParallelGroups.create(Grid(), "cpu")
    config = replace(run_config({"llama": LLAMA, "recurrent": RECURRENT}[model]), memory=memory)
    built = build_model(config, groups, vocab_size=VOCAB, dtype=dtype, device="cpu")
    cp = ContextParallel(groups.cp, Mask.causal(SEQ))
    tokens, labels = batch()
    found = {}
    for number in range(2):
        objective, losses = built(tokens, cp=cp, labels=labels)
        (objective / 7).backward()
        found[f"losses {number}"] = losses
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None
        found[name] = full(parameter.grad)
    return isinstance(built, FSDPModule), found


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("model", ["llama", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_fsdp_computes_the_same_bits(model: str, memory: str, dtype: ComputeDType) -> None:
    # FSDP is used on one rank where parameters lie on the host, which is the same place here.
    on_host = replace(MEMORY[memory], optimizer_cpu_offload=True)
    ((plain, found),) = run_ranks(gradients, 1, model, dtype, MEMORY[memory])
    ((sharded, expected),) = run_ranks(gradients, 1, model, dtype, on_host)
    assert (plain, sharded) == (False, True)
    assert found.keys() == expected.keys()
    assert not [name for name, x in found.items() if not torch.equal(x, expected[name])]
