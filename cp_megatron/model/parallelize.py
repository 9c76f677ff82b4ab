"""From a model on the meta device to one spread over the grid: TP by DTensor, dp x cp by FSDP2.

One unit (a layer) at a time gets memory, its initial values and its sharding, so no rank ever
holds more than one layer that is not sharded (and one global tensor on the CPU). A world of one
rank takes the same path.
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
from cp_megatron.model.initialize import initial_value
from cp_megatron.model.transformer import Transformer
from cp_megatron.tensor_parallel import named_specs, place

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

    Parameters are DTensors, split over the tp axis as their modules say and over dp x cp by FSDP2.
    Gradients are *summed* over dp x cp. With bfloat16 the parameters are float32, computed with in
    bfloat16, and their gradients are reduced in float32.

    Args:
        config: the run; ``model``, ``parallel``, ``train.seed`` and the sequence length are read.
        groups: this rank's groups.
        vocab_size: ids the data can hold.
        dtype: what is computed in.
        device: where the parameters live.
        initialize: draw the initial weights; False leaves zeros, for who loads others over them.

    Raises:
        ConfigError: the model does not divide over the tp axis.
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

    def fill(unit: nn.Module, prefix: str) -> None:
        for name, owner, attribute, spec in list(named_specs(unit)):
            parameter = owner.get_parameter(attribute)
            if not parameter.is_meta:
                continue  # a layer's, seen again from the root
            if initialize:
                value = initial_value(
                    prefix + name,
                    parameter.shape,
                    spec,
                    config=config.model,
                    seed=config.train.seed,
                )
            else:
                value = torch.zeros((), dtype=stored).expand(parameter.shape)  # no memory
            placed = place(value.to(stored), spec, groups.meshes["tp"], device)
            owner.register_parameter(attribute, nn.Parameter(placed))

    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            # Inputs have their types already; the angles' sines among them are float32.
            cast_forward_inputs=False,
        )
    offload = OffloadPolicy()
    if config.memory.optimizer_cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=torch.device(device).type == "cuda")
    shard = partial(
        fully_shard, mesh=groups.meshes["dp_cp"], mp_policy=policy, offload_policy=offload
    )
    for name, layer in model.layers.items():
        fill(layer, f"layers.{name}.")
        shard(layer)
    fill(model, "")
    shard(model)
    sum_gradients(model)
    return model


def sum_gradients(model: nn.Module) -> None:
    """Let FSDP sum gradients over its ranks; its default is the mean."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without it the factor is handed to the backend as a scaled sum, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
