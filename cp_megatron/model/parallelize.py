"""Spreads a model from the meta device over the grid: tp by DTensor, dp x cp by FSDP2.

Memory, initial values and sharding are given to one unit (a layer) at a time, so no rank ever holds
more than one unsharded layer, plus one global tensor on the CPU. A world of one rank takes the same
path.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config.schema import Config
from cp_megatron.model.gated_delta_net import Decay
from cp_megatron.model.initialize import initial_value
from cp_megatron.model.transformer import Transformer
from cp_megatron.tensor_parallel import attach_units, named_specs, place

ComputeDType = Literal["float64", "float32", "bfloat16"]


def build_model(
    config: Config,
    groups: ParallelGroups,
    *,
    vocab_size: int,
    dtype: ComputeDType,
    device: torch.device | str,
    initialize: bool = True,
) -> Transformer:
    """The initialised model, ready to train.

    Parameters are DTensors, split over the tp axis as the spec says and over dp x cp by FSDP2.
    Gradients are *summed* over dp x cp. With bfloat16 the parameters are float32, the computation
    is in bfloat16, and gradients are reduced in float32.

    Args:
        config: the run; ``model``, ``parallel``, ``train.seed`` and the sequence length are read.
        groups: this rank's groups.
        vocab_size: number of ids in the data.
        dtype: the compute type.
        device: where the parameters live.
        initialize: draw the initial weights; False leaves zeros for a caller that loads others.

    Raises:
        ConfigError: the tp ranks cannot share the model.
    """
    with torch.device("meta"):
        model = Transformer(
            config.model,
            seq_length=config.data.seq_length,
            vocab_size=vocab_size,
            tp=groups.tp,
            sequence_parallel=config.parallel.sequence_parallel,
            memory=config.memory,
        )
    stored = torch.float64 if dtype == "float64" else torch.float32

    def fill(unit: nn.Module, prefix: str = "") -> None:
        for owner, attribute, spec in list(named_specs(unit, prefix)):
            if not owner.get_parameter(attribute).is_meta:
                continue  # a layer's parameter, reached again from the root
            if initialize:
                value = initial_value(spec, config=config.model, seed=config.train.seed)
            else:
                value = torch.zeros((), dtype=stored).expand(spec.shape)  # no memory
            placed = place(value.to(stored), spec, groups.meshes["tp"], device)
            owner.register_parameter(attribute, nn.Parameter(placed))

    if groups.dp_cp.size() == 1 and not config.memory.optimizer_cpu_offload:
        fill(model)
        attach_units(model, model.layers.values(), getattr(torch, dtype), unrounded=(Decay,))
        return model
    shard = _sharding(config, groups, dtype, device)
    for name, layer in model.layers.items():
        fill(layer, f"layers.{name}")
        if dtype == "bfloat16":
            _shard_apart(layer, _sharding(config, groups, "float32", device))
        shard(layer)
    fill(model)
    shard(model)
    _sum_gradients(model)
    return model


def _sum_gradients(model: nn.Module) -> None:
    """Lets FSDP sum gradients over the ranks; the default is the mean."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Otherwise the factor is passed to the backend as a scaled sum, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)


def _shard_apart(layer: nn.Module, shard: partial[FSDPModule]) -> None:
    """Makes units of their own of the modules that compute with unrounded parameters."""
    for module in layer.modules():
        if isinstance(module, Decay):
            shard(module)


def _sharding(
    config: Config, groups: ParallelGroups, dtype: ComputeDType, device: torch.device | str
) -> partial[FSDPModule]:
    """``fully_shard`` over dp x cp with the precision and the place of the parameters."""
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        # Inputs have their types already; the angles' sines among them are float32.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    offload = OffloadPolicy()
    if config.memory.optimizer_cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=torch.device(device).type == "cuda")
    return partial(
        fully_shard, mesh=groups.sharding, mp_policy=policy, offload_policy=offload
    )
