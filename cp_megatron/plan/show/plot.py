"""A picture of a schedule: which rank computes which part of the attention matrix in which round.

Rows are queries, columns are keys. The left edge shows which rank holds the rows, the upper edge
which rank holds the columns. A patch has the colour of the rank that computes it and the number of
its round. If heads are exchanged, a patch belongs to a group of ranks, each of which computes it
for the heads in the legend.

The size of the file is bounded: patches smaller than a pixel are drawn together, and each pixel has
the colour of the rank that computes most of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from cp_megatron.plan.show import svg
from cp_megatron.plan.show.shapes import Patch, Point, patches
from cp_megatron.plan.show.summary import (
    DrawableSchedule,
    Summary,
    exchange_in_words,
    mask_in_words,
)
from cp_megatron.plan.show.svg import LETTER, LINE, SMALL_LETTER
from cp_megatron.plan.tiling import Span, pack

SIDE, LEFT, TOP, EDGE = 640, 76, 128, 15  # pixels
EXACT = 4  # cells of at least this many pixels are drawn one by one, smaller ones as slanted lines
BORDER = 6  # narrower patches have no white border, which would hide them
LEGEND_ROWS = 30
MAX_PATCHES = 40_000
NEUTRAL = "#c9d2dc"


class _Placed(NamedTuple):
    patch: Patch
    group: int
    number: int  # of the round


def write_svg(schedule: DrawableSchedule, path: str) -> None:
    """Writes the picture to the file ``path``. The same schedule always gives the same bytes."""
    summary = Summary.of(schedule)
    drawing, notes = _matrix(schedule)
    legend, width = _legend(schedule, summary)
    notes = [*_explanations(schedule), *notes]
    total_width = LEFT + SIDE + 28 + max(width, 120)
    total_height = TOP + SIDE + 16 + LINE * len(notes)
    subtitles = _subtitles(schedule)
    elements = [
        svg.text(LEFT, 24, subtitles[0], 'font-size="16" font-weight="bold"'),
        *(svg.text(LEFT, 25 + LINE * i, line) for i, line in enumerate(subtitles) if i),
        svg.text(LEFT + SIDE / 2, TOP - 2 * EDGE - 8, "keys", 'text-anchor="middle"'),
        f'<text transform="translate({LEFT - 2 * EDGE - 8} {TOP + SIDE // 2}) rotate(-90)" '
        'text-anchor="middle">queries</text>',
        *_edges(schedule),
        *drawing,
        *_documents(schedule),
        f'<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#333"/>',
        *legend,
        *(svg.text(LEFT, TOP + SIDE + LINE * (i + 1), note) for i, note in enumerate(notes)),
    ]
    svg.write_picture(path, total_width, total_height, elements)


def _subtitles(schedule: DrawableSchedule) -> list[str]:
    layout, size = schedule.layout, schedule.layout.cp_size
    ranks = "1 rank" if size == 1 else f"{size} ranks"
    heads = f", {schedule.num_heads} query and {schedule.num_kv_heads} key/value heads"
    return [
        f"{layout.kind} on {ranks}, {exchange_in_words(schedule)}",
        f"{mask_in_words(schedule.mask)}; {schedule.mask.seq_len:,} tokens"
        + (heads if schedule.all_to_all_size > 1 else ""),
        f"chosen: {schedule.reason}" if schedule.reason != "asked for" else "",
    ]


def _explanations(schedule: DrawableSchedule) -> list[str]:
    colour = "Colour: the rank that computes it"
    if schedule.all_to_all_size > 1:
        colour = "Colour: the group of ranks that computes it, each member for its own heads"
        if schedule.hierarchical_sizes[1] == 1:
            colour = "Every rank computes all of it, for its own heads"
    return [
        f"{colour}. Number: the round. White: masked, never computed.",
        "Left edge: the rank that holds the queries. Upper edge: the rank that holds the keys.",
        *(["Outlined squares: documents."] if len(schedule.mask.lengths) > 1 else []),
    ]


# ---- colours -------------------------------------------------------------------------------------


def rank_colour(schedule: DrawableSchedule, rank: int) -> str:
    """The colour of a rank. Members of one of several groups have shades of the group's colour."""
    all_to_all_size, groups = schedule.hierarchical_sizes
    if all_to_all_size == 1 or groups == 1:
        return svg.colour(rank, schedule.layout.cp_size)
    member = rank % all_to_all_size / (all_to_all_size - 1) - 0.5
    return svg.colour(rank // all_to_all_size, groups, shade=-0.16 * member)


def group_colour(schedule: DrawableSchedule, group: int) -> str:
    """The colour of a group. If heads are not exchanged, a group is one rank."""
    if schedule.all_to_all_size > 1 and schedule.hierarchical_sizes[1] == 1:
        return NEUTRAL
    return svg.colour(group, schedule.layout.cp_size // schedule.all_to_all_size)


# ---- the matrix ----------------------------------------------------------------------------------


def _matrix(schedule: DrawableSchedule) -> tuple[list[str], list[str]]:
    scale = SIDE / schedule.mask.seq_len
    placed = list(_placed(schedule))
    seen = [item for item in placed if max(_sides(item.patch)) * scale >= 1]
    tiny = [item for item in placed if max(_sides(item.patch)) * scale < 1]
    notes = []
    if tiny:
        notes.append(f"Drawn together, one colour a pixel: {len(tiny):,} areas below a pixel.")
    if len(seen) > MAX_PATCHES:
        seen.sort(key=lambda item: math.prod(_sides(item.patch)), reverse=True)
        left_out = sum(item.patch.pairs for item in seen[MAX_PATCHES:])
        share = left_out / sum(item.patch.pairs for item in placed)
        areas = f"{len(seen) - MAX_PATCHES:,} smallest areas"
        notes.append(f"Not drawn: the {areas}, {share:.2%} of the pairs.")
        seen = seen[:MAX_PATCHES]
    pixels = _pixels(tiny, scale)
    drawing: list[str] = []
    for group in range(schedule.layout.cp_size // schedule.all_to_all_size):
        mine = [item for item in seen if item.group == group]
        drawing += _group(mine, pixels.get(group, ""), scale, group_colour(schedule, group))
    return drawing, notes


def _placed(schedule: DrawableSchedule) -> Iterator[_Placed]:
    """All patches. Members of a group compute the same tiles, so the first stands for all."""
    for group, chunks in enumerate(schedule.group_layout.chunks):
        queries = pack(chunks)
        for number, round_ in enumerate(schedule.rounds(group * schedule.all_to_all_size)):
            keys = pack(round_.keys)
            for tile in round_.tiles:
                for patch in patches(tile, queries, keys):
                    yield _Placed(patch, group, number)


def _sides(patch: Patch) -> Span:
    return patch.rows[1] - patch.rows[0], patch.keys[1] - patch.keys[0]


def _group(mine: Sequence[_Placed], pixels: str, scale: float, colour: str) -> list[str]:
    paths = {True: "", False: ""}
    numbers = []
    for patch, _, number in mine:
        corners = patch.outline(exact=scale >= EXACT)
        points = [(LEFT + x * scale, TOP + y * scale) for x, y in corners]
        pixels_across = min(_sides(patch)) * scale
        paths[pixels_across >= BORDER] += svg.path_of(points)
        place = _inside(points, letters=len(str(number))) if pixels_across >= 10 else None
        if place:
            numbers.append(svg.text(*place, str(number)))
    lines = [f'<g fill="{colour}">']
    if paths[True]:
        lines.append(f'<path stroke="#fff" stroke-width="0.8" d="{paths[True]}"/>')
    if paths[False]:
        lines.append(f'<path d="{paths[False]}"/>')
    if pixels:
        lines.append(f'<path class="pixels" d="{pixels}"/>')
    if numbers:
        lines += ['<g fill="#222" text-anchor="middle" font-size="11">', *numbers, "</g>"]
    return [*lines, "</g>"] if len(lines) > 1 else []


def _inside(points: Sequence[Point], letters: int) -> Point | None:
    """The place of a number of ``letters`` digits in a polygon; None if it does not fit."""
    area = x = y = 0.0
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]]):
        cross = x0 * y1 - x1 * y0
        area, x, y = area + cross, x + (x0 + x1) * cross, y + (y0 + y1) * cross
    if area == 0:
        return None
    x, y = x / (3 * area), y / (3 * area)
    half_width, half_height = LETTER * letters / 2 + 1, 5
    box = [(x + a * half_width, y + b * half_height) for a in (-1, 1) for b in (-1, 1)]
    return (x, y + 4) if all(_contains(points, corner) for corner in box) else None


def _contains(points: Sequence[Point], point: Point) -> bool:
    """Whether a ray from ``point`` to the right crosses the border an odd number of times."""
    x, y = point
    inside = False
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]]):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            inside = not inside
    return inside


def _pixels(tiny: Sequence[_Placed], scale: float) -> dict[int, str]:
    """Patches below a pixel as path data per group; the group with most pairs gets the pixel."""
    shares: dict[tuple[int, int], dict[int, int]] = {}
    for patch, group, _ in tiny:
        row, key = (int((a + b) / 2 * scale) for a, b in (patch.rows, patch.keys))
        share = shares.setdefault((row, key), {})
        share[group] = share.get(group, 0) + patch.pairs
    paths: dict[int, str] = {}
    for (row, key), share in sorted(shares.items()):
        winner = max(share, key=lambda group: (share[group], -group))
        x, y = LEFT + key, TOP + row
        paths[winner] = paths.get(winner, "") + f"M{x} {y}h1v1h-1z"
    return paths


def _edges(schedule: DrawableSchedule) -> Iterator[str]:
    scale = SIDE / schedule.mask.seq_len
    needed = max(10, SMALL_LETTER * len(str(schedule.layout.cp_size - 1)) + 2)
    for rank, chunks in enumerate(schedule.layout.chunks):
        path, numbers = "", []
        wide = min(stop - start for start, stop in chunks) * scale >= BORDER
        border = ' stroke="#fff" stroke-width="0.8"' if wide else ""
        for start, stop in chunks:
            a, b = start * scale, stop * scale
            top, left = TOP - EDGE - 3, LEFT - EDGE - 3
            for x0, x1, y0, y1 in (
                (LEFT + a, LEFT + b, top, top + EDGE),
                (left, left + EDGE, TOP + a, TOP + b),
            ):
                path += svg.rectangle(x0, x1, y0, y1)
                if b - a >= needed:
                    numbers.append(svg.text((x0 + x1) / 2, (y0 + y1) / 2 + 3.5, str(rank)))
        yield f'<path class="edge" fill="{rank_colour(schedule, rank)}"{border} d="{path}"/>'
        if numbers:
            yield f'<g text-anchor="middle" font-size="10">{"".join(numbers)}</g>'


def _documents(schedule: DrawableSchedule) -> Iterator[str]:
    scale = SIDE / schedule.mask.seq_len
    edges = schedule.mask.starts.tolist()
    spans = [(a * scale, b * scale) for a, b in pairwise(edges) if (b - a) * scale >= 3]
    if len(schedule.mask.lengths) > 1 and spans:
        path = "".join(svg.rectangle(LEFT + a, LEFT + b, TOP + a, TOP + b) for a, b in spans)
        yield f'<path fill="none" stroke="#333" stroke-width="0.7" d="{path}"/>'


def _legend(schedule: DrawableSchedule, summary: Summary) -> tuple[list[str], int]:
    count = len(summary.ranks)
    shown = summary.ranks[: count if count <= LEGEND_ROWS else LEGEND_ROWS - 1]
    table = [("rank", "pairs", "of mean", "keys received", "heads")]
    table += [
        (str(row.rank), f"{row.pairs:,}", f"{row.pairs / summary.mean_pairs:.3f}",
         f"{row.keys_received:,}", row.heads)
        for row in shown
    ]  # fmt: skip
    start = LEFT + SIDE + 28
    x = start + 18
    lines, rights = [], []
    for column in zip(*table):
        x += math.ceil(LETTER * max(map(len, column))) + 14
        rights.append(x - 14)
    has_heads = schedule.all_to_all_size > 1
    for index, cells in enumerate(table):
        y = TOP + 10 + LINE * index
        if index:
            colour = rank_colour(schedule, index - 1)
            lines.append(f'<rect x="{start}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        lines += [svg.text(rights[i], y, cells[i], 'text-anchor="end"') for i in range(4)]
        if has_heads:
            lines.append(svg.text(rights[3] + 14, y, cells[4]))
    y = TOP + 10 + LINE * len(table)
    if len(shown) < count:
        lines.append(svg.text(start, y, f"and {count - len(shown)} more ranks"))
        y += LINE
    lines.append(svg.text(start, y, f"busiest over mean {summary.busiest:.3f}"))
    lines.append(svg.text(start, y + LINE, f"all receive {summary.keys_received:,} keys"))
    width = (rights[4] if has_heads else rights[3]) - LEFT - SIDE - 28
    return lines, width + 12
