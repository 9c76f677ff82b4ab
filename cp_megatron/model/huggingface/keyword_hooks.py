"""Brings the batch's plan to attention layers whose parents drop keyword arguments.

In some models of transformers (StableLM, for example) a decoder layer accepts the keyword arguments
of the call and does not pass them on to its attention, but it does pass the mask. A hook of the
layer puts the plan into what takes the place of the mask. The layer's recomputation in backward has
the arguments of its first call, and so the plan of its own batch.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn

from cp_megatron.model.huggingface.attention_interface import WantedMask

# The name of an attribute of the modules that have the hook.
_HANDS_DOWN = "_cp_megatron_hands_down"


def hand_down(model: nn.Module) -> None:
    """Adds the hook to all modules that accept any keyword argument, and do not have it yet."""
    for module in model.modules():
        parameters = inspect.signature(type(module).forward).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters) and _HANDS_DOWN not in vars(module):
            setattr(module, _HANDS_DOWN, True)
            module.register_forward_pre_hook(_put_plan_into_mask, with_kwargs=True)


def _put_plan_into_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: gives the masks among the arguments the plan of the same call."""
    plan = kwargs.get("context_parallel")

    def handed(value: Any) -> Any:
        is_mask = isinstance(value, WantedMask) and plan is not None
        return replace(value, plan=plan) if is_mask else value

    return tuple(map(handed, args)), {name: handed(value) for name, value in kwargs.items()}
