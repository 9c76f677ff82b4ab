"""The attention schedules of a run's layers, without torch."""

from __future__ import annotations

from cp_megatron.plan import Schedule
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.spec import local_heads


def schedules(plan: RunPlan) -> tuple[Schedule, ...]:
    """Builds one schedule for each attention window of the model's layers.

    If documents are masked, each batch has a schedule of its own; these are the schedules of a row
    that is one document.

    Returns:
        The schedules; empty if one rank holds the whole row.
    """
    sequence, model = plan.sequence, plan.config.model
    if plan.grid.cp == 1:
        return ()
    heads = local_heads(model, plan.grid.tp)
    row = Schedule.build(
        sequence.mask,
        sequence.layout,
        sequence.exchange,
        sequence.route,
        *heads,
        sequence.sizes,
        head_dim=model.head_dim,
    )
    sizes = row.hierarchical_sizes if row.exchange == "a2a+p2p" else None
    windows = [model.layer_window(layer) for layer in range(model.num_layers)]
    masks = {mask.window: mask for mask in map(sequence.mask.within, windows)}
    return tuple(
        row
        if mask.window == sequence.mask.window
        else Schedule.build(mask, row.layout, row.exchange, row.route, *heads, sizes)
        for mask in masks.values()
    )
