"""What a layer received in forward, for its recomputation in backward (gradient checkpointing).

A hook of the layer gives each of its calls an object of its own, by way of the batch's plan.
transformers checkpoints the layer's ``forward`` with the arguments that hooks have prepared, so
the recomputation gets the object of its first run. (Where hooks run within the checkpoint, it gets
a new one, and receives everything again.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from cp_megatron.context_parallel import Received

# An attribute of the modules that have the hook.
_REMEMBERS = "_cp_megatron_remembers"
_LAYER = "GradientCheckpointingLayer"  # of transformers


@dataclass(eq=False)
class RecomputedLayer:
    """The messages of one call of a layer, in the order of its operations.

    Attributes:
        messages: one for each operation of the first run.
        place: the operation of the current run that is next.
        task: the pass of backward in which the current run happens; -1 outside of one.
    """

    messages: list[Received] = field(default_factory=list)
    place: int = 0
    task: int = -1

    def next(self) -> Received:
        """Returns the messages of the next operation; a new run begins with each pass."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.place = task, 0
        if self.place == len(self.messages):
            self.messages.append(Received())
        self.place += 1
        return self.messages[self.place - 1]


def remember_messages(model: nn.Module) -> None:
    """Adds the hook to every layer that transformers can recompute and that does not have it."""
    for module in model.modules():
        is_layer = any(base.__name__ == _LAYER for base in type(module).__mro__)
        if is_layer and _REMEMBERS not in vars(module):
            setattr(module, _REMEMBERS, True)
            module.register_forward_pre_hook(_renew, with_kwargs=True)


def _renew(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook: gives the plan an empty object for this call of the layer."""
    plan = kwargs.get("context_parallel")
    if plan is None or not torch.is_grad_enabled():
        return None
    if not (module.gradient_checkpointing and module.training):
        return None
    return args, {**kwargs, "context_parallel": replace(plan, recomputed=RecomputedLayer())}
