"""A transformers model that takes whole rows and shards them itself, for loops of others.

To DDP, FSDP, accelerate and transformers' Trainer, the ranks of a context parallel group then look
like data parallel ranks that were dealt the same rows. Such loops average gradients over all ranks,
and of equal values the average is the value:

    loss         each rank returns the loss of the whole rows, as one rank alone would
    gradients    a rank's gradient is that of its own tokens, times the size of the group, so that
                 the mean over the group is the gradient of the whole rows

Shapes: B batch, S tokens of the whole row, N ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.errors import ConfigError
from cp_megatron.model.huggingface.batch_plan import BatchPlan, shard_batch
from cp_megatron.model.huggingface.row_documents import LONGEST

_HANDLES = "_cp_megatron_whole_rows"  # the attribute of a model that holds its two hooks


def take_whole_rows(
    model: nn.Module,
    group: dist.ProcessGroup | None,
    *,
    whole_logits: bool = False,
    **options: Any,
) -> None:
    """Makes calls of a model take whole rows, the same on every rank of the group.

    A call then passes through ``shard_batch``, and its outputs are those of whole rows: the loss
    and every [B, S] of values for tokens. All else is left out of the outputs. A call with a batch
    from ``shard_batch`` works as before. A second call for a model replaces the first.

    Args:
        model: registered as in ``huggingface.register``; the outermost module that loops call.
        group: the ranks that share each row; None is one rank.
        whole_logits: outside of training, each rank returns the logits [B, S, vocabulary] as well.
        options: those of ``shard_batch``: ``layout``, ``exchange`` and so on.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if "context_parallel" in kwargs:
            return None
        return (), _sharded(args, kwargs, group, options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any:
        plan: BatchPlan = kwargs["context_parallel"]
        if not plan.outputs_whole:
            return outputs
        return _gathered(outputs, plan, with_logits=whole_logits and not module.training)

    for handle in vars(model).pop(_HANDLES, ()):
        handle.remove()
    # Before the hook that checks a model whose batch is sharded.
    first = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    second = model.register_forward_hook(after, with_kwargs=True)
    setattr(model, _HANDLES, (first, second))


def _sharded(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    group: dist.ProcessGroup | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of the model for this rank's part; what is no tensor stays as it is."""
    if args:
        rule = "must be given by name: model(input_ids=...)"
        raise ConfigError("arguments of the model", "", rule)
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        rule = "needs the keys of whole rows, which no rank has"
        raise ConfigError("use_cache", True, rule, "generation with a model of its own")
    read = (*LONGEST, "num_items_in_batch")
    rows = {k: x for k, x in kwargs.items() if isinstance(x, Tensor) or k in read}
    batch = shard_batch(group, **rows, **options)
    batch["context_parallel"] = replace(batch["context_parallel"], outputs_whole=True)
    return {**{k: x for k, x in kwargs.items() if k not in rows}, **batch}


def _gathered(outputs: Any, plan: BatchPlan, *, with_logits: bool) -> Any:
    """Outputs of the same type with what is known of whole rows."""
    if not isinstance(outputs, Mapping):
        raise ConfigError("return_dict", False, "must be true: outputs are found by name")
    whole = {}
    for name, x in outputs.items():
        if name == "loss":
            whole[name] = all_gather_dim(x.reshape(1), 0, plan.cp.group).sum()
        elif isinstance(x, Tensor) and (x.ndim == 2 or (name == "logits" and with_logits)):
            whole[name] = plan.whole(x)
    if not whole:
        rule = "are too large for a rank to hold for whole rows, and there is no loss"
        works = "labels in the call; or outside of training, take_whole_rows(whole_logits=True)"
        raise ConfigError("outputs of the model", ", ".join(outputs), rule, works)
    return type(outputs)(**whole)
