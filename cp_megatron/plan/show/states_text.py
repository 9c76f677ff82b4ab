"""The plan of states as text: what each rank gives, needs and receives."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cp_megatron.plan.halo import Halo
from cp_megatron.plan.show.summary import numbers
from cp_megatron.plan.show.text import MAX_RANKS, in_bytes
from cp_megatron.plan.states import StatePlan, StateSize


def print_states(plan: StatePlan, size: StateSize, halos: Sequence[Halo], console: Console) -> None:
    """Prints the chains of a plan, and each rank's share of them for one layer and row.

    Args:
        plan: pieces, chains and heads.
        size: elements of a head's transition and state, and their bytes.
        halos: what the layer's convolution sends.
        console: prints.
    """
    lines = {
        "states": f"{plan.heads[-1][1]} heads; {len(plan.pieces):,} pieces, {len(plan.chains):,} "
        f"chains, {plan.longest_chain} pieces in the longest",
        "messages": f"{plan.num_dependent_messages} that wait for each other, forward and backward",
        "halo": f"{sum(len(halo.received) for halo in halos):,} tokens travel to convolutions",
    }
    console.print()
    for name, text in lines.items():
        console.print(f"{name:<10}{text}", highlight=False, markup=False)
    console.print()
    console.print(_table(plan, size, halos, console), highlight=False, markup=False)


def _table(plan: StatePlan, size: StateSize, halos: Sequence[Halo], console: Console) -> Table:
    ranks = range(len(plan.heads))
    moved = [
        [plan.bytes_received(rank, size, backward=backward) for rank in ranks]
        for backward in (False, True)
    ]
    box = SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=box, pad_edge=False, show_footer=True)
    table.add_column("rank", "all", justify="right")
    for name, footer in (
        ("states in", f"{sum(map(len, plan.entering)):,}"),
        ("states out", f"{sum(map(len, plan.leaving)):,}"),
        ("transitions", f"{sum(map(len, plan.through)):,}"),
        ("halo", f"{sum(len(halo.received) for halo in halos):,}"),
        ("chains of heads", ""),
        ("bytes received", in_bytes(sum(moved[0]))),
        ("in backward", in_bytes(sum(moved[1]))),
    ):
        table.add_column(name, footer, justify="right")
    for rank in ranks[:MAX_RANKS]:
        span = plan.heads[rank]
        table.add_row(
            str(rank),
            *(f"{len(x[rank]):,}" for x in (plan.entering, plan.leaving, plan.through)),
            f"{len(halos[rank].received):,}",
            numbers(span) if span[1] > span[0] else "none",
            *(in_bytes(of_pass[rank]) for of_pass in moved),
        )
    if len(ranks) > MAX_RANKS:
        table.add_row("...", f"{len(ranks) - MAX_RANKS} more ranks")
    return table
