"""AdamW over sharded parameters, and how a step updates without asking the device first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

from cp_megatron.config import OptimizerConfig
from cp_megatron.tensor_parallel import named_specs


class LocalAdamW(AdamW):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), updating what this rank holds.

    The state is sharded like the parameters, as checkpoints store it. The update itself runs on
    the local tensors, so that a group of parameters takes one fused call.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient; ``update`` says what it obeys."""
        assert closure is None, "the gradients exist"
        for group in self.param_groups:
            self._update_group(group)

    def _update_group(self, group: dict[str, Any]) -> None:
        lists: list[list[Tensor]] = [[] for _ in range(6)]
        self._init_group(group, *lists)  # type: ignore[no-untyped-call]
        local = ([local_values(x) for x in tensors] for tensors in lists)
        parameters, gradients, means, squares, maxima, counts = local  # no maxima
        beta1, beta2 = group["betas"]
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None and any(x.dtype == torch.float64 for x in gradients):
            torch._foreach_div_(gradients, scale)  # the fused call takes a float32 scale
            scale = None
        adamw(
            parameters,
            gradients,
            means,
            squares,
            maxima,
            counts,
            fused=True,
            grad_scale=None if scale is None else scale.float(),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    *,
    vectors: Collection[nn.Parameter] = (),
) -> AdamW:
    """AdamW over sharded parameters; the learning rate is set by every step."""
    return LocalAdamW(decay_groups(parameters, config, vectors), **adamw_settings(config))


def decay_groups(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    vectors: Collection[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Groups of parameters: weight decay applies to matrices and embeddings, not to vectors.

    Args:
        parameters: those to update.
        config: the settings.
        vectors: those of several dims that are no matrices, such as the biases of experts.
    """
    parameters, stacked = list(parameters), set(map(id, vectors))
    decays = [parameter.ndim > 1 and id(parameter) not in stacked for parameter in parameters]
    decayed = [parameter for parameter, decay in zip(parameters, decays) if decay]
    kept = [parameter for parameter, decay in zip(parameters, decays) if not decay]
    rates = (decayed, config.weight_decay), (kept, 0.0)
    return [{"params": some, "weight_decay": rate} for some, rate in rates if some]


def stacked_vectors(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of several dims that the model's description says do not decay."""
    described = ((owner.get_parameter(name), spec) for owner, name, spec in named_specs(model))
    return [parameter for parameter, spec in described if len(spec.shape) > 1 and not spec.decays]


def adamw_settings(config: OptimizerConfig) -> dict[str, Any]:
    """AdamW's arguments besides the parameters."""
    return {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "fused": True,
    }


def update(optimizer: Any, *, skip: Tensor | None, factor: Tensor | None = None) -> None:
    """Lets an optimizer update, or not, as a number on the device says; the host does not wait.

    The optimizer obeys two attributes, as torch's fused optimizers do for ``torch.amp.GradScaler``.
    With ``found_inf``, float32 [], at 1 it leaves parameters, state and counts of updates as they
    are. It divides gradients by ``grad_scale``, [], while it reads them anyway. If the parameters
    are on the CPU and the numbers are not, the host has to wait for them.

    Args:
        optimizer: one that obeys them.
        skip: bool [], whether everything stays as it is; None always updates.
        factor: [], what gradients are multiplied by, which may change them in place; None is 1.
    """
    device = next(p for group in optimizer.param_groups for p in group["params"]).device
    if skip is not None:
        optimizer.found_inf = skip.to(device).float()
    if factor is not None:
        optimizer.grad_scale = factor.to(device).reciprocal()
    try:
        optimizer.step()
    finally:
        optimizer.found_inf = optimizer.grad_scale = None


def local_values(x: Tensor) -> Tensor:
    """The part of a parameter, of its gradient or of its state that this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x
