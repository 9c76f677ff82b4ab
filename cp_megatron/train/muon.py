"""Muon for the matrices of layers, and AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025,
arXiv:2502.16982) replaces the running mean of a matrix's gradients by a matrix with the same
singular vectors and singular values near 1. This takes the whole matrix, and of the stacked
matrices of experts each one by itself. ``torch.optim.Muon`` takes one matrix at a time, in bfloat16
only, and knows no skipped step, so that only its conventions are taken over: the momentum is a
running mean, and its state is called ``momentum_buffer``.

    gradients, parts --> momentum, parts --> all-to-all --> whole matrices, a few on each rank
    parameters, parts <-- parts of the results <-- all-to-all <-- Newton-Schulz iterations

Every grid computes with the same whole matrices, and so has the same result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import AdamW

from cp_megatron.comm.matrix_owners import MatrixOwners, SharedMatrix, shared_matrices
from cp_megatron.config import OptimizerConfig
from cp_megatron.spec import is_hidden_matrix
from cp_megatron.tensor_parallel import named_specs
from cp_megatron.train.newton_schulz import coefficients, orthogonalize
from cp_megatron.train.optimizer import (
    LocalAdamW,
    adamw_settings,
    decay_groups,
    local_values,
    make_optimizer,
    stacked_vectors,
)

_ROUND_ELEMENTS = 1 << 26
"""Elements that a rank gets in one message: 128 MiB in bfloat16, and several times that in
intermediate results. A larger matrix travels alone."""


class Muon(LocalAdamW):
    """Muon for some matrices, AdamW for other parameters; both obey what ``update`` says.

    The momentum is sharded as the parameters are. Newton-Schulz iterations are computed in float64
    for float64 parameters, in bfloat16 on CUDA, as published, and in float32 on the CPU.

    Args:
        matrices: the parameters for Muon, [m, n] or stacks [E, m, n]; every one gets a gradient in
            every step.
        others: the parameters for AdamW.
        config: the settings of both.
        group: the ranks that share the parameters; None is one rank.
        device: where whole matrices are computed with, and messages are sent from.
        vectors: see ``decay_groups``.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Iterable[nn.Parameter],
        config: OptimizerConfig,
        *,
        group: ProcessGroup | None,
        device: torch.device,
        vectors: Collection[nn.Parameter] = (),
    ) -> None:
        groups = decay_groups(others, config, vectors)
        groups += [{**group, "is_muon": True} for group in decay_groups(matrices, config)]
        super().__init__(groups, **adamw_settings(config))
        self._config, self._device = config, device
        self._rounds = list(_rounds(matrices, group))
        self._steps = coefficients(config.muon_coefficient_type, config.muon_num_ns_steps)

    def _update_group(self, group: dict[str, Any]) -> None:
        if not group.get("is_muon"):
            super()._update_group(group)
            return
        for parameter in group["params"]:
            if not (state := self.state[parameter]):
                state["momentum_buffer"] = torch.zeros_like(parameter)
        nothing = local_values(group["params"][0]).flatten()[:0]
        for owners in self._rounds:
            if owners.held:
                self._update_matrices(owners, lr=group["lr"], decay=group["weight_decay"])
            else:  # this rank may compute for others all the same
                self._orthogonalized(owners, nothing)

    def _update_matrices(self, owners: MatrixOwners, *, lr: float, decay: float) -> None:
        """Updates this rank's parts of the matrices of a round."""
        found = getattr(self, "found_inf", None)
        skip = None if found is None else found.bool()
        parameters = [matrix.part(local_values(matrix.tensor)) for matrix in owners.held]
        direction = self._advance(owners.held, skip)
        result = self._orthogonalized(owners, direction).to(direction)
        kept = direction.new_full((), 1 - lr * decay)
        if skip is not None:  # NaN must not reach the parameters
            result = result.masked_fill(skip, 0)
            kept = kept.masked_fill(skip, 1)
        torch._foreach_mul_(parameters, kept)
        torch._foreach_add_(parameters, _parts(result, parameters), alpha=-lr)

    def _advance(self, matrices: Sequence[SharedMatrix], skip: Tensor | None) -> Tensor:
        """Updates the momentum; returns what is to be orthogonalized, the parts of this rank."""
        buffers = [self._buffer(matrix) for matrix in matrices]
        gradient = torch.cat([self._gradient(matrix).flatten() for matrix in matrices])
        if (scale := getattr(self, "grad_scale", None)) is not None:
            gradient.div_(scale)
        before = torch.cat([x.flatten() for x in buffers])
        momentum = self._config.muon_momentum
        after = before.lerp(gradient, 1 - momentum)
        if skip is not None:
            after = torch.where(skip, before, after)
        torch._foreach_copy_(buffers, _parts(after, buffers))
        return gradient.lerp(after, momentum) if self._config.muon_nesterov else after

    def _orthogonalized(self, owners: MatrixOwners, direction: Tensor) -> Tensor:
        """The update of this rank's parts, scaled, from their directions; [elements] both."""
        dtype = direction.dtype
        if dtype != torch.float64:
            dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        sent = direction.to(self._device, dtype)
        wholes = owners.collect(sent)
        by_shape = defaultdict[torch.Size, list[int]](list)
        for number, whole in enumerate(wholes):
            by_shape[whole.shape].append(number)
        for shape, numbers in by_shape.items():
            stacked = torch.stack([wholes[number] for number in numbers])  # [matrices, m, n]
            results = orthogonalize(stacked, self._steps, dtype)
            for number, result in zip(numbers, results.mul_(self._scale(*shape)), strict=True):
                wholes[number] = result
        return owners.distribute(wholes, sent)

    def _scale(self, rows: int, columns: int) -> float:
        """The factor of an update, by which it gets its size.

        ``spectral``: updates of all shapes have the same root mean square (Liu et al. 2025, eq. 3);
        ``shape_scaling``: Jordan et al. 2024; ``unit_rms_norm``: Pethick et al. 2025,
        arXiv:2502.07529.
        """
        factors = {
            "spectral": math.sqrt(max(rows, columns)),
            "shape_scaling": math.sqrt(max(1, rows / columns)),
            "unit_rms_norm": math.sqrt(rows / columns),
        }
        return factors[self._config.muon_scale_mode] * self._config.muon_extra_scale_factor

    def _gradient(self, matrix: SharedMatrix) -> Tensor:
        assert matrix.tensor.grad is not None, "all ranks update all matrices"
        return matrix.part(local_values(matrix.tensor.grad))

    def _buffer(self, matrix: SharedMatrix) -> Tensor:
        return matrix.part(local_values(self.state[matrix.tensor]["momentum_buffer"]))


def choose_optimizer(
    model: nn.Module, config: OptimizerConfig, *, group: ProcessGroup, device: torch.device
) -> AdamW:
    """The optimizer that ``--optimizer`` names.

    Args:
        model: a transformer with sharded parameters, or a pipeline stage of one.
        config: the settings.
        group: the ranks that share the model, or the pipeline stage of it.
        device: where the model computes.
    """
    vectors = stacked_vectors(model)
    if config.optimizer == "adam":
        return make_optimizer(model.parameters(), config, vectors=vectors)
    hidden = {
        owner.get_parameter(name)
        for owner, name, spec in named_specs(model)
        if is_hidden_matrix(spec)
    }
    matrices = [parameter for parameter in model.parameters() if parameter in hidden]
    others = [parameter for parameter in model.parameters() if parameter not in hidden]
    return Muon(matrices, others, config, group=group, device=device, vectors=vectors)


def _rounds(tensors: Sequence[nn.Parameter], group: ProcessGroup | None) -> Iterator[MatrixOwners]:
    """Matrices of one shape meet in one round as far as possible, to be computed together.

    Of stacks, each rank's first matrices come before the second ones, so that no rank is idle.
    """
    largest = _ROUND_ELEMENTS * (1 if group is None else group.size())
    waiting, elements = list[SharedMatrix](), 0
    matrices = shared_matrices(tensors, group)
    for matrix in sorted(matrices, key=lambda matrix: (matrix.shape, matrix.turn)):
        if waiting and elements + matrix.numel > largest:
            yield MatrixOwners(waiting, group)
            waiting, elements = [], 0
        waiting.append(matrix)
        elements += matrix.numel
    if waiting:
        yield MatrixOwners(waiting, group)


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A flat tensor cut into parts of the shapes of other tensors."""
    parts = flat.split([x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]
