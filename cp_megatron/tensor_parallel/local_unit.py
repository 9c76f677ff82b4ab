"""Weights that no other rank shares, as plain tensors in the compute type, for one unit at a time.

FSDP does this where weights are sharded. Without it, parameters are DTensors over the tp axis, in
float32 if the model computes in bfloat16. A unit is a layer, or what lies outside of the layers:

    before forward     the unit's parameters are replaced by plain tensors of the compute type
    after forward      the parameters return; the memory of rounded copies is freed
    before backward    the copies are filled and take the parameters' place once more
    after backward     the parameters return, and get their gradients in their own type

A whole unit costs one node of autograd, and one message for all gradients that are summands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cp_megatron.tensor_parallel.placement import SpecifiedModule, named_specs


class LocalUnit:
    """The parameters of some modules while a forward or a backward pass runs through them.

    Args:
        owned: every parameter of the unit: its owner, and its name there. It is a DTensor over the
            tp axis alone.
        dtype: the compute type.
        unrounded: the types of modules that compute with parameters of the stored type.
    """

    def __init__(
        self,
        owned: Iterable[tuple[SpecifiedModule, str]],
        dtype: torch.dtype,
        unrounded: tuple[type[nn.Module], ...] = (),
    ) -> None:
        self._owned = list(owned)
        self.masters = [cast(DTensor, owner.get_parameter(name)) for owner, name in self._owned]
        kept = [isinstance(owner, unrounded) for owner, _ in self._owned]
        self.dtypes = [x.dtype if keep else dtype for x, keep in zip(self.masters, kept)]
        self.is_partial = [owner.is_partial(name) for owner, name in self._owned]

    def attach(self, module: nn.Module, *, frees: bool) -> None:
        """Lets the forward pass of ``module`` compute with the unit's plain tensors.

        Args:
            module: it returns a tensor, or several of which the first is computed last, if
                ``frees``.
            frees: free rounded copies between forward and backward. Otherwise those live that
                autograd keeps, and nothing in the module may run again in backward.
        """
        module.register_forward_pre_hook(self._before_forward)
        hook = self._after_forward if frees else self._restore_hook
        module.register_forward_hook(hook, always_call=True)  # also after an exception

    def restore(self) -> None:
        """Puts the parameters back in their place."""
        self._install(self.masters)

    def locals(self) -> list[Tensor]:
        """This rank's parts of the parameters, in the stored type."""
        with torch.no_grad():
            return [master.to_local() for master in self.masters]

    def _before_forward(self, module: nn.Module, args: object) -> None:
        self._install(_Plain.apply(self, *self.masters))

    def _restore_hook(self, module: nn.Module, args: object, out: object) -> None:
        self.restore()

    def _after_forward(
        self, module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...] | None
    ) -> None:
        weights = [cast(Tensor, owner._parameters[name]) for owner, name in self._owned]
        self.restore()
        if isinstance(out, tuple):
            out = out[0]  # backward begins with what is computed last
        if out is None or not out.requires_grad:
            return
        copies = [(w, x) for w, x in zip(weights, self.locals()) if w.dtype != x.dtype]
        for weight, _ in copies:
            weight.untyped_storage().resize_(0)
        waiting = [weights]

        def fill(grad: Tensor) -> None:
            # The hook lives as long as the graph, but the copies as long as backward reads them.
            self._fill(waiting.pop())

        out.register_hook(fill)

    def _fill(self, weights: Sequence[Tensor]) -> None:
        """Before backward: gives the copies their values, and makes them the parameters again."""
        targets, sources = [], []
        for weight, source in zip(weights, self.locals()):
            if weight.dtype == source.dtype:
                continue
            storage = weight.untyped_storage()
            storage.resize_(weight.numel() * weight.element_size())
            # A new tensor over that storage, so that autograd does not see an in-place change.
            target = torch.empty(0, dtype=weight.dtype, device=weight.device)
            targets.append(target.set_(storage, 0, weight.shape, weight.stride()))
            sources.append(source)
        if targets:
            torch._foreach_copy_(targets, sources)
        self._install(weights)

    def _install(self, tensors: Sequence[Tensor]) -> None:
        for (owner, name), tensor in zip(self._owned, tensors, strict=True):
            owner._parameters[name] = tensor  # type: ignore[assignment]


class _Plain(torch.autograd.Function):
    """Forward: DTensors -> plain tensors of the compute type. Backward: the gradients as DTensors
    of the stored type, each placed as its parameter is."""

    @staticmethod
    def forward(ctx: Any, unit: LocalUnit, *masters: DTensor) -> tuple[Tensor, ...]:
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        return tuple(_converted(unit.locals(), unit.dtypes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unit = ctx.unit
        unit.restore()
        there = [number for number, grad in enumerate(grads) if grad is not None]
        stored = [unit.masters[number].dtype for number in there]
        exact = _converted([cast(Tensor, grads[number]) for number in there], stored)
        gradients = dict(zip(there, exact))
        summands = {number: x for number, x in gradients.items() if unit.is_partial[number]}
        gradients |= _summed_over_tp(summands, unit.masters[0])
        placed: list[Tensor | None] = [None] * len(grads)
        for number, x in gradients.items():
            mesh, placements = unit.masters[number].device_mesh, unit.masters[number].placements
            placed[number] = DTensor.from_local(x, mesh, placements, run_check=False)
        return None, *placed


def _converted(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors in these types; those that have theirs already are not copied."""
    results = [
        x.view_as(x) if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
        for x, dtype in zip(tensors, dtypes, strict=True)
    ]
    changed = [(y, x) for y, x in zip(results, tensors) if y.dtype != x.dtype]
    if changed:
        torch._foreach_copy_([y for y, _ in changed], [x for _, x in changed])
    return results


def _summed_over_tp(summands: Mapping[int, Tensor], parameter: DTensor) -> dict[int, Tensor]:
    """The sums over the tp ranks, by the same numbers, in one message."""
    if not summands:
        return {}
    together = torch.cat([x.flatten() for x in summands.values()])
    dist.all_reduce(together, group=parameter.device_mesh.get_group())
    parts = together.split([x.numel() for x in summands.values()])
    return {number: part.view_as(x) for (number, x), part in zip(summands.items(), parts)}


def attach_units(
    model: nn.Module,
    layers: Iterable[nn.Module],
    dtype: torch.dtype,
    unrounded: tuple[type[nn.Module], ...] = (),
) -> None:
    """Makes a unit of every layer, and one of the model's other parameters.

    Args:
        model: its parameters are DTensors over the tp axis alone.
        layers: those of its modules that may run again in backward; see ``attach`` for what they
            return.
        dtype, unrounded: see ``LocalUnit``.
    """
    inside = set[SpecifiedModule]()
    for layer in layers:
        owned = [(owner, name) for owner, name, _ in named_specs(layer)]
        inside.update(owner for owner, _ in owned)
        LocalUnit(owned, dtype, unrounded).attach(layer, frees=True)
    ends = [(owner, name) for owner, name, _ in named_specs(model) if owner not in inside]
    LocalUnit(ends, dtype, unrounded).attach(model, frees=False)
