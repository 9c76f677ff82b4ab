"""Context parallelism in the training loops of accelerate, transformers and trl.

    rank                   0      1      2      3        4 ranks, context_parallel_size 2
    its group              0      0      1      1
    accelerate deals       row 0  row 1  row 2  row 3    each rank trains on half of its row, if
                                                         nobody tells it: half of each row is lost
    after these functions  row 0  row 0  row 1  row 1

Rows are dealt to groups, the model shards them (``take_whole_rows``), and what evaluation gathers
from all ranks counts each row once. None of the three packages is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_map_only

from cp_megatron.errors import ConfigError
from cp_megatron.model.huggingface.whole_rows import take_whole_rows

_MESH = "_cp_megatron_mesh"  # an attribute of an accelerator that is prepared


def prepare_trainer(trainer: Any, context_parallel_size: int, **options: Any) -> None:
    """Makes transformers' Trainer, or one derived from it, train with context parallelism.

    Call it on every rank after the trainer is made, and before ``train`` or ``evaluate``. The
    model's attention is the registered one.

    Args:
        trainer: its ranks are numbered so that ranks next to each other form a group.
        context_parallel_size: the number of ranks that share a row. The batch size per device of
            the trainer's arguments is the number of rows of such a group.
        options: those of ``shard_batch``.

    Raises:
        ConfigError: the size does not divide the ranks, or an option of the trainer needs logits
            or counts that no rank has.
    """
    args = trainer.args
    refused = {
        "label_smoothing_factor": (args.label_smoothing_factor, "needs the logits of whole rows"),
        "compute_loss_func": (trainer.compute_loss_func, "needs the logits of whole rows"),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha,
            "would scale its noise by the number of tokens of one rank",
        ),
        "eval_use_gather_object": (args.eval_use_gather_object, "would count rows several times"),
        "include_num_input_tokens_seen": (
            args.include_num_input_tokens_seen,
            "would count the tokens of a row once for each rank of its group",
        ),
    }
    for name, (value, rule) in refused.items():
        if value and value != "no" and context_parallel_size > 1:
            raise ConfigError(name, value, f"{rule} under context parallelism", f"no {name}")
    prepare_accelerator(
        trainer.accelerator,
        trainer.model,
        context_parallel_size,
        whole_logits=trainer.compute_metrics is not None,
        **options,
    )
    trainer.gather_function = trainer.accelerator.gather_for_metrics
    count_rows = partial(type(trainer).get_total_train_batch_size, trainer)
    trainer.get_total_train_batch_size = lambda args: count_rows(args) // context_parallel_size


def prepare_accelerator(
    accelerator: Any,
    model: nn.Module,
    context_parallel_size: int,
    *,
    whole_logits: bool = False,
    **options: Any,
) -> None:
    """Makes a loop of accelerate train with context parallelism.

    Call it on every rank before ``accelerator.prepare``. Dataloaders prepared later deal rows to
    groups, and ``gather_for_metrics`` returns each row once. Call it again for a second model, with
    the same size.

    Args:
        accelerator: of ranks with DDP or FSDP; ranks next to each other form a group.
        model: the model, whose attention is the registered one; it is changed in place.
        context_parallel_size: the number of ranks that share a row.
        whole_logits, options: those of ``take_whole_rows``.

    Raises:
        ConfigError: the size does not divide the ranks, or accelerate shards rows itself.
    """
    size, world = context_parallel_size, accelerator.num_processes
    if size < 1 or world % size:
        works = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        rule = f"must divide the number of ranks, {world}"
        raise ConfigError("context_parallel_size", size, rule, works)
    mesh: DeviceMesh | None = vars(accelerator).get(_MESH)
    if mesh is not None and mesh["cp"].size() != size:
        rule = "differs from the size that this accelerator was prepared with"
        raise ConfigError("context_parallel_size", size, rule, str(mesh["cp"].size()))
    if mesh is None and size > 1:
        _refuse_other_sharding(accelerator)
        axes = {"dp_replicate": world // size, "cp": size}
        device, names = accelerator.device.type, tuple(axes)
        mesh = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=names)
        setattr(accelerator, _MESH, mesh)
        accelerator.prepare_data_loader = _for_groups(accelerator, mesh)
        accelerator.prepare_scheduler = _once_a_step(accelerator)
        accelerator.gather_for_metrics = _each_row_once(accelerator, size)
    group = None if mesh is None else mesh["cp"].get_group()
    take_whole_rows(model, group, whole_logits=whole_logits, **options)


def _refuse_other_sharding(accelerator: Any) -> None:
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ConfigError("distributed_type", kind, "deals rows in its own way", "DDP or FSDP")
    others = getattr(accelerator, "parallelism_config", None)
    if others is not None and others.non_data_parallel_size > 1:
        rule = "has tensor, context or sequence parallelism of accelerate itself"
        raise ConfigError("parallelism_config", "", rule, "none, or data parallelism alone")
    if accelerator.dispatch_batches:
        rule = "deals other rows to each rank of a group"
        raise ConfigError("dispatch_batches", True, rule, "False: each rank reads its rows")
    accelerator.dataloader_config.dispatch_batches = False


def _for_groups(accelerator: Any, mesh: DeviceMesh) -> Callable[..., Any]:
    """``prepare_data_loader``, which gives all ranks along the axis ``cp`` of its mesh one row."""
    prepare, state = accelerator.prepare_data_loader, accelerator.state

    def for_groups(*args: Any, **kwargs: Any) -> Any:
        # The mesh is there for dataloaders alone: FSDP would look for axes of its own in it.
        kept, state.device_mesh = getattr(state, "device_mesh", None), mesh
        try:
            return prepare(*args, **kwargs)
        finally:
            state.device_mesh = kept

    return for_groups


def _once_a_step(accelerator: Any) -> Callable[..., Any]:
    """``prepare_scheduler``, which refuses a scheduler that would step once for each rank."""
    prepare = accelerator.prepare_scheduler

    def once_a_step(*args: Any, **kwargs: Any) -> Any:
        if accelerator.step_scheduler_with_optimizer and not accelerator.split_batches:
            rule = "steps the scheduler once for each rank, but a group trains on one batch"
            works = "Accelerator(step_scheduler_with_optimizer=False)"
            raise ConfigError("step_scheduler_with_optimizer", True, rule, works)
        return prepare(*args, **kwargs)

    return once_a_step


def _each_row_once(accelerator: Any, size: int) -> Callable[..., Any]:
    """``gather_for_metrics`` of the first rank of each group, without the last batch's filling."""

    def each_row_once(input_data: Any, use_gather_object: bool = False) -> Any:
        if use_gather_object:
            raise ConfigError("use_gather_object", True, "is for tensors of ranks that differ")
        state, world = accelerator.gradient_state, accelerator.num_processes
        kept = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

        def first_of_group(x: Tensor) -> Tensor:
            return x.unflatten(0, (world // size, size, -1))[:, 0].flatten(0, 1)[:kept]

        return tree_map_only(Tensor, first_of_group, accelerator.gather(input_data))

    return each_row_once
