"""A pipeline as text: what each stage waits, keeps and sends, and its passes in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cp_megatron.plan.pipeline import Action, PipelinePlan
from cp_megatron.plan.pipeline_timeline import PipelineTimeline
from cp_megatron.plan.show.text import MAX_RANKS

COLUMNS = ("stage", "waits", "in flight", "sent", "received")
"""The table of stages shows the share of the time in which a stage waits, the passes whose
activations it keeps at most, and the messages that it sends and receives in a step."""


def print_pipeline(timeline: PipelineTimeline, console: Console) -> None:
    """Prints what a plan is, each stage's share of it, and the passes of each stage."""
    plan = timeline.plan
    for name, text in summary(timeline).items():
        console.print(f"{name:<10}{text}", highlight=False, markup=False)
    console.print()
    box = SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=box, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    shown = range(min(plan.num_stages, MAX_RANKS))
    for stage in shown:
        table.add_row(*cells(timeline, stage))
    console.print(table, highlight=False, markup=False)
    console.print()
    for stage in shown:
        line = f"stage {stage:<4}{passes_in_words(plan, stage)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if plan.num_stages > len(shown):
        console.print(f"... {plan.num_stages - len(shown)} more stages", highlight=False)


def summary(timeline: PipelineTimeline) -> dict[str, str]:
    """The lines that describe the whole plan, by their names."""
    plan = timeline.plan
    kind = "interleaved 1F1B" if plan.num_chunks > 1 else "1F1B"
    chunks = f" of {plan.num_chunks} chunks each" if plan.num_chunks > 1 else ""
    stages = "1 stage" if plan.num_stages == 1 else f"{plan.num_stages:,} stages"
    batches = f"{plan.num_microbatches:,} micro batch{'es' if plan.num_microbatches > 1 else ''}"
    example, place = (
        ("F3.1", " through chunk 1 of the stage") if plan.num_chunks > 1 else ("F3", "")
    )
    return {
        "pipeline": f"{kind}, {stages}{chunks}, {batches}",
        "bubble": f"{timeline.bubble:.1%} of the time, if a backward pass takes as long as two "
        "forward passes",
        "passes": f"{example} is the forward pass of micro batch 3{place}, B a backward pass",
    }


def cells(timeline: PipelineTimeline, stage: int) -> tuple[str, ...]:
    """The row of a stage in the table with ``COLUMNS``."""
    plan = timeline.plan
    actions = plan.actions(stage)
    counts = (
        plan.in_flight(stage),
        sum(plan.sent(stage, action) is not None for action in actions),
        sum(plan.received(stage, action) is not None for action in actions),
    )
    return str(stage), f"{timeline.idle(stage):.1%}", *(f"{count:,}" for count in counts)


def passes_in_words(plan: PipelinePlan, stage: int) -> str:
    """The passes of a stage, where runs are shortened.

    ``F0-2  F3 B0 ... F7 B4  B5-7`` stands for the forward passes of micro batches 0 to 2, then
    forward and backward passes in turn, then the backward passes of 5 to 7.
    """
    return "  ".join(_runs(plan.actions(stage), has_chunks=plan.num_chunks > 1))


def _runs(actions: Sequence[Action], *, has_chunks: bool) -> Iterator[str]:
    at = 0
    while at < len(actions):
        alike, in_turn = _length(actions, at, 1), _length(actions, at, 2)
        if in_turn >= 4 and actions[at].kind != actions[at + 1].kind:
            first, last = actions[at : at + 2], actions[at + in_turn - 2 : at + in_turn]
            ends = (" ".join(_short(x, has_chunks) for x in pair) for pair in (first, last))
            yield (" " if in_turn == 4 else " ... ").join(ends)
            at += in_turn
        else:
            until = actions[at + alike - 1].microbatch if alike > 1 else None
            yield _short(actions[at], has_chunks, until)
            at += alike


def _length(actions: Sequence[Action], at: int, period: int) -> int:
    """Passes from ``at`` on of which each follows, in a period, one of the micro batch before."""
    stop = at + period
    while stop < len(actions):
        before, action = actions[stop - period], actions[stop]
        if before._replace(microbatch=before.microbatch + 1) != action:
            break
        stop += 1
    return (stop - at) // period * period


def _short(action: Action, has_chunks: bool, until: int | None = None) -> str:
    run = "" if until is None else f"-{until}"
    chunk = f".{action.chunk}" if has_chunks else ""
    return f"{action.kind[0].upper()}{action.microbatch}{run}{chunk}"
