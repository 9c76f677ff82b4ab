"""Spreads a model from the meta device over the grid: tp by DTensor, dp x cp by FSDP2.

The experts of a layer are spread over the same ranks in another way: ep by DTensor, and edp by
FSDP2, as a unit inside the layer's. Their gradients arrive with the tokens of all ranks of ep, and
are summed over edp.

Memory, initial values and sharding are given to one unit (a layer) at a time, so no rank ever holds
more than one unsharded layer, plus one global tensor on the CPU. Where dp x cp is one rank, there
is no FSDP (``tensor_parallel/local_unit.py``), unless the parameters live on the host, or several
ranks share experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.host_collectives import HostGather, HostReduceScatter, HostReductions
from cp_megatron.config.schema import Config
from cp_megatron.expert_parallel import ExpertParallel
from cp_megatron.model.expert_mixture import Experts
from cp_megatron.model.gated_delta_net import Decay
from cp_megatron.model.initialize import initial_value
from cp_megatron.model.transformer import Transformer
from cp_megatron.plan.stages import Chunk
from cp_megatron.spec import ParameterSpec, is_sharded, keeps_whole_weights
from cp_megatron.tensor_parallel import (
    SpecifiedModule,
    attach_units,
    named_specs,
    place,
    place_stacked,
)

ComputeDType = Literal["float64", "float32", "bfloat16"]


def build_model(
    config: Config,
    groups: ParallelGroups,
    *,
    vocab_size: int,
    dtype: ComputeDType,
    device: torch.device | str,
    initialize: bool = True,
    chunks: Sequence[Chunk] | None = None,
) -> Transformer:
    """The initialised model, or the chunks of its layers that a pipeline stage has, ready to train.

    Parameters are DTensors, split over the tp axis as the spec says and over the dp x cp ranks of a
    replica by FSDP2. Gradients are *summed* over dp x cp. With bfloat16 the parameters are float32,
    the computation is in bfloat16, and gradients are reduced in float32.

    Args:
        config: the run; ``model``, ``parallel``, ``train.seed`` and the sequence length are read.
        groups: this rank's groups, with those of experts if the model has some and there are
            several ranks.
        vocab_size: number of ids in the data.
        dtype: the compute type.
        device: where the parameters live.
        initialize: draw the initial weights; False leaves zeros for a caller that loads others.
        chunks: those of this rank's stage; by default the whole model.

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
            experts=_expert_parallel(config, groups),
            chunks=chunks,
        )
    fill = partial(_fill, config=config, groups=groups, dtype=dtype, device=device)
    if not initialize:
        fill = partial(fill, value_of=_zeros)
    if is_sharded(config.model, groups.grid, offloads=config.memory.optimizer_cpu_offload):
        keeps_whole = keeps_whole_weights(config, groups.grid, model.spec)
        shard = _Sharding.of(config, groups, dtype, device, keeps_whole=keeps_whole)
        _shard(model, shard, fill)
    else:
        fill(model)
        attach_units(model, model.layers.values(), getattr(torch, dtype), unrounded=(Decay,))
    return model


def _expert_parallel(config: Config, groups: ParallelGroups) -> ExpertParallel | None:
    if not config.model.expert_layers or groups.stage.size() == 1:
        return None
    return ExpertParallel(group=groups["ep"], row_group=groups["cp_tp"])


def _fill(
    unit: nn.Module,
    prefix: str = "",
    *,
    config: Config,
    groups: ParallelGroups,
    dtype: ComputeDType,
    device: torch.device | str,
    value_of: Callable[..., Tensor] = initial_value,
) -> None:
    """Gives memory and values to what a unit has on the meta device."""
    stored = torch.float64 if dtype == "float64" else torch.float32
    for module in unit.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if isinstance(module, SpecifiedModule) and buffer.is_meta:
                module.register_buffer(name, torch.zeros(buffer.shape, device=device))
    for owner, attribute, spec in list(named_specs(unit, prefix)):
        if not owner.get_parameter(attribute).is_meta:
            continue  # a layer's parameter, reached again from the root
        value = partial(value_of, spec, config=config.model, seed=config.train.seed)
        if spec.stacked and groups.expert_sharding is not None:
            ep, rank = groups.meshes["ep"], groups["ep"].rank()
            number = spec.shape[0] // ep.size()
            own = range(rank * number, (rank + 1) * number)
            placed = place_stacked(value(part=own).to(stored), ep, device)
        else:
            placed = place(value().to(stored), spec, groups.meshes["tp"], device)
        owner.register_parameter(attribute, nn.Parameter(placed))


def _zeros(spec: ParameterSpec, *, part: Sequence[int] | None = None, **_: object) -> Tensor:
    shape = spec.shape if part is None else (len(part), *spec.shape[1:])
    return torch.zeros(()).expand(shape)  # no memory


def _shard(model: Transformer, shard: _Sharding, fill: Callable[..., None]) -> None:
    """Makes FSDP units of the layers and the ends, filling one at a time.

    A head that is not tied is a unit with the norm before it, whose gradients are reduced while
    those of the layers are computed. The embedding belongs to the root unit, because its gradient
    comes last of all; a tied head shares it.
    """
    for chunk in model.chunks:
        units = list[list[FSDPModule]]()
        for number in chunk.layers:
            layer = model.layers[str(number)]
            fill(layer, f"layers.{number}")
            inner = [*shard.experts(layer), *shard.unrounded(layer)]
            units.append([shard(layer), *inner])
        if chunk.has_head and not model.spec.head.tied:
            # Backward begins with the head.
            fill(model)
            units.append([shard(model.norm, model.head, reshard_after_forward=False)])
        for unit, following in pairwise(units):
            unit[0].set_modules_to_forward_prefetch(following)
    fill(model)
    shard(model)
    _set_reduction(model, shard)


def _set_reduction(model: nn.Module, shard: _Sharding) -> None:
    """Lets FSDP sum gradients over the ranks, where the default is the mean, and choose messages
    that suit the device."""
    on_cpu = shard.mesh.device_type == "cpu"
    # Replicas add up the result, and offloading moves it, as soon as FSDP has it.
    is_viewed = shard.mesh.ndim == 1 and not isinstance(shard.offload, CPUOffloadPolicy)
    reductions = HostReductions() if is_viewed else None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if on_cpu:
                module.set_custom_all_gather(HostGather())  # type: ignore[arg-type]
                reduce_scatter = HostReduceScatter(_sharded_parameters(module), reductions)
                module.set_custom_reduce_scatter(reduce_scatter)  # type: ignore[arg-type]
            module.set_gradient_divide_factor(1.0)
            # Otherwise the factor is passed to the backend as a scaled sum, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
    if on_cpu:
        # There are no streams: a gather that is prefetched returns at once, and is awaited later.
        model._set_unshard_async_op(True)  # type: ignore[operator]


def _sharded_parameters(unit: FSDPModule) -> list[nn.Parameter]:
    """The parameters of all modules of an FSDP unit, which has no public way to ask for them."""
    group = unit._get_fsdp_state()._fsdp_param_group
    return [] if group is None else [parameter.sharded_param for parameter in group.fsdp_params]


@dataclass(frozen=True, kw_only=True)
class _Sharding:
    """``fully_shard`` over a replica's ranks with the precision and the place of the parameters."""

    mesh: DeviceMesh
    dtype: ComputeDType
    offload: OffloadPolicy
    keeps_whole: bool
    expert_mesh: DeviceMesh | None

    @classmethod
    def of(
        cls,
        config: Config,
        groups: ParallelGroups,
        dtype: ComputeDType,
        device: torch.device | str,
        *,
        keeps_whole: bool,
    ) -> _Sharding:
        offload = OffloadPolicy()
        if config.memory.optimizer_cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=torch.device(device).type == "cuda")
        return cls(
            mesh=groups.sharding,
            dtype=dtype,
            offload=offload,
            keeps_whole=keeps_whole,
            expert_mesh=groups.expert_sharding,
        )

    def __call__(
        self,
        *modules: nn.Module | None,
        reshard_after_forward: bool | None = None,
        shard_dim: Callable[[nn.Parameter], Shard] | None = None,
    ) -> FSDPModule:
        """Makes one unit of the modules that are not None; returns the first of them.

        Args:
            modules: those of the unit.
            reshard_after_forward: as in ``fully_shard``; no unit does if whole weights are kept.
            shard_dim: the dim of a parameter that is divided; None: dim 0.
        """
        unit = [module for module in modules if module is not None]
        policy = MixedPrecisionPolicy()
        if self.dtype == "bfloat16":
            # Inputs have their types already; the angles' sines among them are float32.
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        fully_shard(
            unit,
            mesh=self.mesh,
            mp_policy=policy,
            offload_policy=self.offload,
            reshard_after_forward=False if self.keeps_whole else reshard_after_forward,
            shard_placement_fn=shard_dim,
        )
        return cast(FSDPModule, unit[0])

    def experts(self, layer: nn.Module) -> list[FSDPModule]:
        """Makes a unit of its own of the layer's experts, on their mesh."""
        found = [module for module in layer.modules() if isinstance(module, Experts)]
        if not found:
            return []
        assert self.expert_mesh is not None, "groups with experts"
        ranks = self.expert_mesh.shape[-1]
        dims = {
            owner.get_parameter(name): spec.shard_dim(ranks)
            for owner, name, spec in named_specs(found[0])
        }
        unit = replace(self, mesh=self.expert_mesh)
        return [unit(found[0], shard_dim=lambda parameter: Shard(dims[parameter]))]

    def unrounded(self, layer: nn.Module) -> list[FSDPModule]:
        """Makes units of their own of the modules that compute with unrounded parameters."""
        if self.dtype != "bfloat16":
            return []
        found = [module for module in layer.modules() if isinstance(module, Decay)]
        return [replace(self, dtype="float32")(module) for module in found]
