"""What of a model and its AdamW a checkpoint holds, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def model_state(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """The parameters by name, and the state they and the buffers are stored as.

    ``state_dict`` and not ``named_parameters``: it makes FSDP put its shards back into the module
    (they are gathered after a forward pass without backward), and leaves out passing buffers.
    """
    parameters: dict[str, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is not a tensor; a checkpoint holds no pickles")
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if isinstance(tensor, nn.Parameter):
            parameters[name] = tensor
        state[f"model.{name}"] = tensor.detach()
    return parameters, state


def optimizer_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None
) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{moment}": value
        for name, values in _states(parameters, optimizer)
        for moment, value in values.items()
        if moment != "step" and isinstance(value, Tensor)
    }


def optimizer_steps(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None
) -> dict[str, int]:
    return {
        name: int(values["step"])
        for name, values in _states(parameters, optimizer)
        if "step" in values
    }


def _states(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parameter in parameters.items():
        # ``state`` is a defaultdict: asking for a parameter it lacks would add it.
        if optimizer is not None and parameter in optimizer.state:
            yield name, optimizer.state[parameter]
