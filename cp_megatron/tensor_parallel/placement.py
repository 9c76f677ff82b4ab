"""Parameters over the tp axis: from their description to DTensors, and back to local tensors.

Parameters are DTensors over the tp axis; activations are plain local tensors. A module is built
with *global* shapes, usually on the meta device, and ``model/parallelize.py`` materialises this
rank's part. A module that keeps its global, ordinary parameters works as it is on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from cp_megatron.spec import BlockSpec, ParameterSpec
from cp_megatron.tensor_parallel.group import TensorParallel


class SpecifiedModule(nn.Module):
    """A module whose own parameters and buffers are those of a block of the spec.

    Args:
        block: describes the parameters; their global shapes are allocated.
        tp: the group that shares them. The module does not keep it.
    """

    specs: dict[str, ParameterSpec]

    def __init__(self, block: BlockSpec, tp: TensorParallel) -> None:
        super().__init__()
        for buffer in block.own_buffers():
            self.register_buffer(buffer.name, torch.zeros(buffer.shape))
        self.specs = {spec.name: spec for spec in block.own_parameters()}
        self._partial = set[str]()
        for name, spec in self.specs.items():
            self.register_parameter(name, nn.Parameter(torch.empty(spec.shape)))
            if spec.is_partial("tp", tp.size, splits_sequence=tp.splits_sequence):
                self._partial.add(name)

    def local(self, name: str) -> Tensor:
        """The part of an own parameter that this tp rank computes with; see ``local_weight``."""
        # Not get_parameter: LocalWeights.replaced puts plain tensors in the place of parameters.
        return local_weight(getattr(self, name), partial=self.is_partial(name))

    def is_partial(self, name: str) -> bool:
        """Whether each tp rank computes a summand of an own parameter's gradient."""
        return name in self._partial

    def local_bias(self) -> Tensor | None:
        """This rank's part of ``bias``; None if there is none."""
        return self.local("bias") if "bias" in self.specs else None


def shared_unit(spec: ParameterSpec, tp: TensorParallel) -> slice | None:
    """Which rows of a parameter this rank computes with, if tp ranks share its units.

    Args:
        spec: the parameter, whose dim 0 consists of units (heads).
        tp: the ranks.

    Returns:
        The slice of dim 0 that is this rank's unit; None if the rank computes with all the rows
        that it holds.
    """
    if spec.units is None or spec.split_dim("tp", tp.size) is not None:
        return None
    # Query heads of one group are neighbours: rank r reads head r // (tp / units).
    width, unit = spec.shape[0] // spec.units, tp.rank * spec.units // tp.size
    return slice(unit * width, (unit + 1) * width)


def named_specs(
    module: nn.Module, prefix: str = ""
) -> Iterator[tuple[SpecifiedModule, str, ParameterSpec]]:
    """Every parameter of a module, in order: its owner, its name there, its description.

    The name in the description is the fully qualified one, behind ``prefix``.
    """
    for path, owner in module.named_modules(prefix=prefix):
        for name, _ in owner.named_parameters(recurse=False):
            assert isinstance(owner, SpecifiedModule), f"{path}.{name} has no description"
            spec = owner.specs[name]
            yield owner, name, replace(spec, name=f"{path}.{name}" if path else name)


class LocalWeights:
    """The parameters of some modules as plain tensors, which can be replaced for a while.

    A function that is differentiated by hand needs the weights that it reads as arguments.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._owners = [(owner, name) for m in modules for owner, name, _ in named_specs(m)]

    def tensors(self) -> list[Tensor]:
        """The parts that this tp rank computes with, in order."""
        return [owner.local(name) for owner, name in self._owners]

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the modules compute with ``tensors``, which are in the order of ``tensors()``."""
        before = [owner._parameters[name] for owner, name in self._owners]
        try:
            self._set(tensors)
            yield
        finally:
            self._set(before)

    def _set(self, tensors: Sequence[Tensor | None]) -> None:
        for (owner, name), tensor in zip(self._owners, tensors, strict=True):
            owner._parameters[name] = tensor  # type: ignore[assignment]


def place(
    value: Tensor, spec: ParameterSpec, tp_mesh: DeviceMesh, device: torch.device | str
) -> DTensor:
    """Turns a global tensor, the same on every rank, into a DTensor over tp without a message.

    This rank's part gets memory of its own on ``device``, so the global tensor can be freed.
    """
    local, size = value, tp_mesh.size()
    dim = spec.split_dim("tp", size)
    if dim is not None:
        assert value.shape[dim] % size == 0, f"{tuple(value.shape)} over {size} ranks"
        local = value.chunk(size, dim)[tp_mesh.get_local_rank()]
    over_tp = Replicate() if dim is None else Shard(dim)
    return DTensor.from_local(_copied(local, device), tp_mesh, [over_tp], run_check=False)


def place_stacked(local: Tensor, ep_mesh: DeviceMesh, device: torch.device | str) -> DTensor:
    """Turns this rank's matrices of a stacked parameter into a DTensor over ep, as ``place``."""
    return DTensor.from_local(_copied(local, device), ep_mesh, [Shard(0)], run_check=False)


def _copied(x: Tensor, device: torch.device | str) -> Tensor:
    # Not ``to(copy=True)``, which keeps the stride 0 of an expanded tensor.
    return torch.empty(x.shape, dtype=x.dtype, device=device).copy_(x)


def local_weight(parameter: Tensor, *, partial: bool = False) -> Tensor:
    """The part of a parameter that this tp rank computes with, as a plain tensor.

    Args:
        parameter: a DTensor over tp or ep alone (inside the forward of a sharded module), or a
            plain tensor, which is returned as it is (inside the forward of a ``LocalUnit``).
        partial: each rank's gradient is a summand of the true one, so DTensor all-reduces it.
            Otherwise the gradient is placed as the parameter is.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    assert parameter.device_mesh.ndim == 1, "a weight is read inside its module's forward"
    return parameter.to_local(grad_placements=[Partial() if partial else parameter.placements[0]])
