"""Refuses sharded batches for models that nobody has looked at.

A layer that does not know ``context_parallel`` ignores it, and would compute with the tokens of one
rank as if they were all. Models that are built after ``register`` are checked when they get a
sharded batch. For others, ``PreTrainedModel.__call__`` asks whether ``check`` has seen them.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from cp_megatron.errors import ConfigError
from cp_megatron.model.transformers_library import import_transformers

WATCHED = "_cp_megatron_watches"
"""The attribute of a model that is checked when it is called, and of what ``register`` wraps."""
VOUCHED = "_cp_megatron_vouched"
"""The attribute of every module that was checked: the fault of its loss, or an empty text."""


def refuse_unseen_models(plan_type: type) -> None:
    """Makes models without either attribute refuse to be called with a sharded batch.

    Args:
        plan_type: the class of ``context_parallel`` in such a call.
    """
    if "transformers" not in sys.modules:
        return  # there is no model yet, and ``register`` comes before those to come
    model_class = import_transformers("context_parallel", "").PreTrainedModel
    if hasattr(model_class.__call__, WATCHED):
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_sharded = type(kwargs.get("context_parallel")) is plan_type
        if is_sharded and WATCHED not in vars(self) and VOUCHED not in vars(self):
            rule = "was built before huggingface.register(), and was not checked"
            works = "huggingface.register() before the model is built, or huggingface.check(model)"
            raise ConfigError("model", type(self).__name__, rule, works)
        return nn.Module.__call__(self, *args, **kwargs)

    setattr(call, WATCHED, True)
    model_class.__call__ = call
