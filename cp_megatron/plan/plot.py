"""A picture of a schedule: the attention matrix, who computes which part of it, in which round."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from cp_megatron.plan.schedule import Schedule
    from cp_megatron.plan.tiles import Span, Tile

SIDE = 480
MARGIN = 48


def write_svg(schedule: Schedule, path: str) -> None:
    """Writes the picture: rows are queries, columns keys, colours ranks, numbers rounds."""
    size, seq_len = schedule.layout.cp_size, schedule.mask.seq_len
    scale = SIDE / seq_len
    shapes = []
    for rank in range(size):
        chunks = list(schedule.layout.chunks[rank])
        for number, turn in enumerate(schedule.rounds(rank)):
            keys = list(turn.keys)
            for tile in turn.tiles:
                for q, k in _rectangles(tile, chunks, keys):
                    shapes.append(_shape(q, k, scale, _colour(rank, size), number, tile))
    title = f"{schedule.mask.kind}, {schedule.layout.kind}, {schedule.exchange} over {size} ranks"
    legend = [
        f'<rect x="{MARGIN + SIDE + 16}" y="{MARGIN + 20 * rank}" width="12" height="12" '
        f'fill="{_colour(rank, size)}"/>'
        f'<text x="{MARGIN + SIDE + 34}" y="{MARGIN + 20 * rank + 11}">'
        f"rank {rank}: {schedule.pairs(rank):,} pairs</text>"
        for rank in range(min(size, 24))
    ]
    body = "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE + MARGIN + 240}" '
            f'height="{SIDE + 2 * MARGIN}" font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{MARGIN}" y="20" font-size="14">{escape(title)}</text>',
            f'<text x="{MARGIN}" y="{MARGIN - 8}">keys</text>',
            f'<text x="2" y="{MARGIN + 12}">queries</text>',
            *shapes,
            f'<rect x="{MARGIN}" y="{MARGIN}" width="{SIDE}" height="{SIDE}" fill="none" '
            'stroke="#444"/>',
            *legend,
            f'<text x="{MARGIN}" y="{MARGIN + SIDE + 20}">number = round; '
            "white = masked, never computed</text>",
            "</svg>",
        ]
    )
    Path(path).write_text(body + "\n", encoding="utf-8")


def _colour(rank: int, size: int) -> str:
    red, green, blue = colorsys.hls_to_rgb(rank / size, 0.68, 0.6)
    return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def _shape(q: Span, k: Span, scale: float, colour: str, number: int, tile: Tile) -> str:
    """One rectangle, or for queries and keys of the same run under a causal band its triangle."""
    x0, x1 = (MARGIN + edge * scale for edge in k)
    y0, y1 = (MARGIN + edge * scale for edge in q)
    corners = [(x0, y0), (x1, y1), (x0, y1)]
    if not (tile.kind == "causal" and q == k):
        corners.insert(1, (x1, y0))
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in corners)
    text = f'<polygon points="{points}" fill="{colour}" stroke="#fff" stroke-width="0.6"/>'
    if min(x1 - x0, y1 - y0) > 14:
        x, y = sum(x for x, _ in corners) / len(corners), sum(y for _, y in corners) / len(corners)
        text += f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{number}</text>'
    return text


def _rectangles(tile: Tile, chunks: list[Span], keys: list[Span]) -> list[tuple[Span, Span]]:
    """The tile in global positions: one rectangle per pair of runs, none above the diagonal."""
    rows = _global_runs(chunks, tile.q0, tile.q1)
    columns = _global_runs(keys, tile.k0, tile.k1)
    return [(q, k) for q in rows for k in columns if tile.kind != "causal" or k[0] <= q[0]]


def _global_runs(runs: list[Span], start: int, stop: int) -> list[Span]:
    """The positions behind local ``start:stop`` of a buffer that holds ``runs`` in order."""
    found = []
    offset = 0
    for first, last in runs:
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            found.append((first + low - offset, first + high - offset))
        offset += last - first
    return found
