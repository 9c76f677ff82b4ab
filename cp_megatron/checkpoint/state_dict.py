"""Names the tensors of a model and its optimizer's state that a checkpoint stores.

``model.<name>`` is a parameter or a persistent buffer; ``optimizer.<name>.<moment>`` (``exp_avg``
and ``exp_avg_sq`` of AdamW, ``momentum_buffer`` of Muon) is what the optimizer keeps for a
parameter. The number of AdamW's updates of a parameter is stored in the manifest. Tied tensors are
stored once, under their first name. Learning rates are not stored, because the schedule is a
function of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

Parameters = Mapping[str, nn.Parameter]


def model_state(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Returns the parameters by name, and the tensors to store of parameters and buffers.

    This calls ``state_dict`` and not ``named_parameters``: it makes FSDP put its shards back into
    the module (they stay gathered after a forward pass without a backward pass), and it leaves out
    buffers that are not persistent.
    """
    parameters: dict[str, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is not a tensor, and a checkpoint stores no pickles")
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if isinstance(tensor, nn.Parameter):
            parameters[name] = tensor
        state[f"model.{name}"] = tensor.detach()
    return parameters, state


def optimizer_state(parameters: Parameters, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Returns the optimizer's tensors to store, except the update counts."""
    return {
        f"optimizer.{name}.{moment}": value
        for name, values in _states(parameters, optimizer)
        for moment, value in values.items()
        if moment != "step" and isinstance(value, Tensor)
    }


def optimizer_steps(parameters: Parameters, optimizer: Optimizer | None) -> dict[str, int]:
    """Returns the number of updates of each parameter that has optimizer state."""
    states = _states(parameters, optimizer)
    return {name: int(values["step"]) for name, values in states if "step" in values}


def is_optimizers(entry_name: str) -> bool:
    """Whether a stored tensor belongs to the optimizer, and not to the model."""
    return entry_name.startswith("optimizer.")


def split_optimizer_name(entry_name: str) -> tuple[str, str]:
    """``optimizer.layers.0.weight.exp_avg`` -> (``layers.0.weight``, ``exp_avg``)."""
    name, _, moment = entry_name.removeprefix("optimizer.").rpartition(".")
    return name, moment


def _states(parameters: Parameters, optimizer: Optimizer | None) -> Iterator[tuple[str, Any]]:
    for name, parameter in parameters.items():
        # ``state`` is a defaultdict: looking a missing parameter up would add it.
        if optimizer is not None and parameter in optimizer.state:
            yield name, optimizer.state[parameter]
