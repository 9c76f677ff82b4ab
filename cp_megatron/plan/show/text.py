"""A schedule as text: a table of all ranks, and the rounds of one rank line by line.

All positions are global, whatever buffer a tile or a message counts in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cp_megatron.plan.rounds import Message, Round
from cp_megatron.plan.schedule import Schedule
from cp_megatron.plan.show.summary import Summary, exchange_in_words, heads_of, many, mask_in_words
from cp_megatron.plan.tiling import (
    LocalRun,
    Span,
    Tile,
    merge_spans,
    num_positions,
    pack,
    positions_at,
    runs_within,
)

MAX_RANKS, MAX_TILES = 128, 12


def print_schedule(schedule: Schedule, console: Console, moved: Sequence[int]) -> None:
    """Prints what was chosen, and each rank's share; ``moved`` is the bytes that it receives."""
    summary, has_heads = Summary.of(schedule), schedule.all_to_all_size > 1
    pairs = sum(row.pairs for row in summary.ranks) // schedule.all_to_all_size
    for name, text in _choices(schedule, pairs):
        console.print(f"{name:<10}{text}", highlight=False, markup=False)
    console.print()
    box = SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=box, pad_edge=False, show_footer=True)
    table.add_column("rank", "all", justify="right")
    table.add_column("holds", "")
    for name, footer in (
        ("pairs", f"{pairs:,}"),
        ("of mean", f"{summary.busiest:.3f} at most"),
        ("keys received", f"{summary.keys_received:,}"),
        ("bytes received", in_bytes(sum(moved))),
    ):
        table.add_column(name, footer, justify="right")
    if has_heads:
        table.add_column("heads", "")
    for row, size in list(zip(summary.ranks, moved))[:MAX_RANKS]:
        cells = [
            str(row.rank),
            many(merge_spans(list(schedule.layout.chunks[row.rank]))),
            f"{row.pairs:,}",
            f"{row.pairs / summary.mean_pairs:.3f}",
            f"{row.keys_received:,}",
            in_bytes(size),
        ]
        table.add_row(*cells, *([row.heads] if has_heads else []))
    if len(moved) > MAX_RANKS:
        table.add_row("...", f"{len(moved) - MAX_RANKS} more ranks")
    console.print(table, highlight=False, markup=False)


def in_bytes(count: int) -> str:
    """Formats ``1536`` as ``1.5 KiB``."""
    power = min((max(count, 1).bit_length() - 1) // 10, 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count / 1024**power:,.{1 if power else 0}f} {unit}"


def _choices(schedule: Schedule, pairs: int) -> Iterator[tuple[str, str]]:
    mask, layout = schedule.mask, schedule.layout
    share = pairs / mask.seq_len**2
    yield "mask", f"{mask_in_words(mask)}; {mask.seq_len:,} tokens, {pairs:,} pairs ({share:.2%})"
    ranks = "1 rank" if layout.cp_size == 1 else f"{layout.cp_size} ranks"
    yield "layout", f"{layout.kind} on {ranks}, {layout.shard_len:,} tokens each"
    yield "exchange", f"{exchange_in_words(schedule)}; {schedule.reason}"
    if schedule.exchange in ("p2p", "a2a+p2p") and layout.cp_size > 1:
        counts = {route: schedule.readers.tokens_received(route) for route in ("ring", "direct")}
        words = " or ".join(f"{count:,} ({route})" for route, count in counts.items())
        who = "ranks" if schedule.all_to_all_size == 1 else "groups"
        yield "route", f"{schedule.route}; all {who} together receive {words} keys"
    yield "heads", f"{schedule.num_heads} query, {schedule.num_kv_heads} key/value"
    if schedule.latent is not None:
        latent, rotary = schedule.latent
        yield "latent", f"{latent} + {rotary} elements a token travel; readers expand the heads"


def print_rank(schedule: Schedule, rank: int, console: Console) -> None:
    """Prints the part of ``rank``: its all-to-all or all-gather, then its rounds."""
    console.print()
    for line in _rank_lines(schedule, rank):
        console.print(line, highlight=False, markup=False)


def _rank_lines(schedule: Schedule, rank: int) -> Iterator[str]:
    chunks = merge_spans(list(schedule.layout.chunks[rank]))
    yield f"rank {rank} holds {schedule.layout.shard_len:,} tokens: {many(chunks)}"
    yield from _all_to_all_lines(schedule, rank)
    gather = schedule.gather(rank)
    if gather is not None:
        given = positions_at(chunks, gather.given)
        yield f"  gathers   gives {_tokens(given)}, padded to {gather.width:,} tokens"
        size = schedule.layout.cp_size
        picked = num_positions(gather.picked)
        yield f"            picks {picked:,} of the {size * gather.width:,} gathered"
    queries = pack(schedule.group_layout.chunks[rank // schedule.all_to_all_size])
    rounds = schedule.rounds(rank)
    idle: list[int] = []
    for number, round_ in enumerate(rounds):
        lines = list(_round_lines(round_, number, queries, rounds, schedule.route))
        if lines:
            yield from _idle_line(idle)
            idle = []
            yield f"round {number}   {_whose(round_, number, schedule)}"
            yield from lines
        else:
            idle.append(number)
    yield from _idle_line(idle)


def _all_to_all_lines(schedule: Schedule, rank: int) -> Iterator[str]:
    exchange = schedule.heads(rank)
    if exchange is None:
        return
    mine = heads_of(schedule, rank)
    peers = many(merge_spans([(peer, peer + 1) for peer in exchange.peers]))
    yield f"  heads     exchanged for tokens with ranks {peers}"
    for peer in exchange.peers:
        if peer != rank:
            theirs = heads_of(schedule, peer)
            yield f"            rank {peer} gets {theirs} of this rank's tokens, gives {mine}"
    yield f"            results go back the same way; the lines below are for {mine}"


def _idle_line(idle: Sequence[int]) -> Iterator[str]:
    if idle:
        numbers = many(merge_spans([(number, number + 1) for number in idle]))
        yield f"round{'s' * (len(idle) > 1)} {numbers}   nothing"


def _whose(round_: Round, number: int, schedule: Schedule) -> str:
    if number == 0:
        return "own keys" if schedule.all_to_all_size == 1 else "keys of its group"
    if round_.owner < 0:
        return f"keys of all others: {many(round_.keys)}"
    owner = f"{'rank' if schedule.all_to_all_size == 1 else 'group'} {round_.owner}"
    return f"keys of {owner}: {_tokens(round_.keys)}"


def _round_lines(
    round_: Round, number: int, queries: Sequence[LocalRun], rounds: Sequence[Round], route: str
) -> Iterator[str]:
    keys = pack(round_.keys)
    for index, tile in enumerate(round_.tiles[:MAX_TILES]):
        yield f"  {'' if index else 'computes':<10}{_tile(tile, queries, keys)}"
    if rest := round_.tiles[MAX_TILES:]:
        pairs = sum(tile.pairs for tile in rest)
        yield f"  {'':<10}and {len(rest):,} more tiles of {pairs:,} pairs"
    if round_.send_keys:
        source = rounds[0].keys if number == 0 or route == "direct" else round_.keys
        yield f"  sends     {_message(round_.send_keys, source)} to rank {round_.send_keys.peer}"
    if round_.receive_keys:
        text = _message(round_.receive_keys, rounds[number + 1].keys)
        yield f"  receives  {text} from rank {round_.receive_keys.peer}, for round {number + 1}"
    words = [
        f"{verb} {message.num_tokens:,} keys {side} rank {message.peer}"
        for message, verb, side in (
            (round_.pass_grads, "passes the gradients of", "to"),
            (round_.return_grads, "returns the gradients of", "to"),
            (round_.receive_passed, "receives gradients of", "from"),
            (round_.receive_returned, "gets back gradients of", "from"),
        )
        if message
    ]
    if words:
        yield f"  backward  {', '.join(words)}"


def _tile(tile: Tile, queries: Sequence[LocalRun], keys: Sequence[LocalRun]) -> str:
    rows = many(tuple(run for _, run in runs_within(queries, tile.q0, tile.q1)))
    columns = many(tuple(run for _, run in runs_within(keys, tile.k0, tile.k1)))
    return f"queries {rows} x keys {columns}, {tile.kind}, {tile.pairs:,} pairs"


def _message(message: Message, source: Sequence[Span]) -> str:
    return f"keys {_tokens(positions_at(source, message.spans))}"


def _tokens(spans: Sequence[Span]) -> str:
    return f"{many(spans)} ({num_positions(spans):,})" if spans else "none"
