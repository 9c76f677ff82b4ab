"""Makes the engine known to transformers, and transformers' models known to the check."""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from cp_megatron.model.huggingface.attention_interface import attention, wanted_mask
from cp_megatron.model.huggingface.check_model import check_call, refuse_own_table
from cp_megatron.model.huggingface.unseen_models import WATCHED
from cp_megatron.model.transformers_library import import_transformers


def register(name: str = "cp_megatron") -> None:
    """Registers the engine in transformers, as ``attn_implementation=name``.

    From now on transformers models are checked: when they are built or set to this attention, and
    when they are first called with a sharded batch. For this, the method by which transformers
    checks an implementation, ``PreTrainedModel.get_correct_attn_implementation``, is wrapped.

    Raises:
        ConfigError: transformers is not installed or too old.
    """
    library = import_transformers("attn_implementation", name)
    library.AttentionInterface.register(name, attention)
    library.AttentionMaskInterface.register(name, wanted_mask)
    _watch_models(library)


def _watch_models(library: ModuleType) -> None:
    model_class = library.PreTrainedModel
    own = model_class.get_correct_attn_implementation
    if hasattr(own, WATCHED):
        return

    @wraps(own)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = own(self, *args, **kwargs)
        if library.AttentionInterface().get(chosen) is attention:
            refuse_own_table(self, chosen)
        if not hasattr(self, WATCHED):
            setattr(self, WATCHED, True)
            self.register_forward_pre_hook(check_call, with_kwargs=True)
        return chosen

    setattr(checked, WATCHED, True)
    model_class.get_correct_attn_implementation = checked
