"""Brings the batch's plan to layers whose parents drop keyword arguments.

In some models of transformers (StableLM, for example) a decoder layer accepts the keyword arguments
of the call and does not pass them on to its attention, but it does pass the mask. A hook of the
layer puts the plan into what takes the place of the mask. The layer's recomputation in backward has
the arguments of its first call, and so the plan of its own batch.

In others (Mamba2) the head does not pass them on to its base model, which would pass them on to its
layers. Such a base model is told the plan before the head calls it, and a hook puts it back.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn

from cp_megatron.model.huggingface.attention_interface import WantedMask

# The name of an attribute of the modules that have the hook.
_HANDS_DOWN = "_cp_megatron_hands_down"
_TOLD = "_cp_megatron_told"  # an attribute of a base model: the plan of the call that has begun


def hand_down(model: nn.Module) -> None:
    """Adds the hooks to all modules that accept any keyword argument, and do not have them yet."""
    for module in model.modules():
        parameters = inspect.signature(type(module).forward).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters) and _HANDS_DOWN not in vars(module):
            setattr(module, _HANDS_DOWN, True)
            module.register_forward_pre_hook(_put_plan_into_mask, with_kwargs=True)
            if module is _base_of(model):
                model.register_forward_pre_hook(_tell_base, with_kwargs=True)
                module.register_forward_pre_hook(_take_plan, with_kwargs=True)


def tell_base(model: nn.Module, plan: Any) -> None:
    """Tells the plan to the base model of a head with hooks, for the call that is about to begin.

    Hooks of the head do this too, but not in the call that adds them, nor if only its ``forward``
    is called.
    """
    base = _base_of(model)
    if base is not None and _HANDS_DOWN in vars(base):
        setattr(base, _TOLD, plan)


def _base_of(model: nn.Module) -> nn.Module | None:
    """The base model of a transformers model that is a head."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) and base is not model else None


def _tell_base(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tell_base(module, kwargs.get("context_parallel"))


def _take_plan(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook of a base model: adds the plan it was told, if the head dropped it."""
    plan = vars(module).pop(_TOLD, None)
    return args, kwargs if plan is None else {"context_parallel": plan, **kwargs}


def _put_plan_into_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: gives the masks among the arguments the plan of the same call."""
    plan = kwargs.get("context_parallel")

    def handed(value: Any) -> Any:
        is_mask = isinstance(value, WantedMask) and plan is not None
        return replace(value, plan=plan) if is_mask else value

    return tuple(map(handed, args)), {name: handed(value) for name, value in kwargs.items()}
