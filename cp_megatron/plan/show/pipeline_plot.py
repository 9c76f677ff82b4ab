"""A picture of a pipeline: when each stage makes which pass.

Each stage has a lane in which its passes lie at their times, with the numbers of their micro
batches. Forward and backward passes have different hues, and the chunks of a stage shades of them.

The size of the file is bounded: only some stages and the first passes are drawn, and notes say how
many others there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

from cp_megatron.plan.pipeline import Kind
from cp_megatron.plan.pipeline_timeline import PipelineTimeline, TimedPass
from cp_megatron.plan.show import svg
from cp_megatron.plan.show.pipeline_text import COLUMNS, cells, summary
from cp_megatron.plan.show.svg import LETTER, LINE, SMALL_LETTER

LEFT, TOP, LANE, GAP, UNIT = 76, 112, 22, 8, 22  # pixels; a unit of time is a forward pass
NARROW, WIDE = 480, 2400  # the width of all passes
MAX_LANES = 64
MAX_PASSES = 20_000
MAX_KEYS = 8  # chunks whose shades are explained


def write_pipeline_svg(timeline: PipelineTimeline, path: str) -> None:
    """Writes the picture to the file ``path``. The same timeline always gives the same bytes."""
    plan = timeline.plan
    lanes = min(plan.num_stages, MAX_LANES)
    width = round(min(max(timeline.duration * UNIT, NARROW), WIDE))
    scale = width / timeline.duration
    bottom = TOP + lanes * (LANE + GAP)
    drawn, notes = _drawn(timeline, lanes)
    legend, legend_width = _legend(timeline, lanes, LEFT + width + 28)
    words = summary(timeline)
    notes = ["Number: the micro batch. White: the stage waits.", *notes]
    elements = [
        svg.text(LEFT, 24, words["pipeline"], 'font-size="16" font-weight="bold"'),
        svg.text(LEFT, 25 + LINE, f"bubble {words['bubble']}"),
        *_keys(plan.num_chunks),
        *_labels(lanes),
        *_passes(drawn, scale, plan.num_chunks),
        *legend,
        *(svg.text(LEFT, bottom + LINE * (i + 1), note) for i, note in enumerate(notes)),
    ]
    below = bottom + LINE * (len(notes) + 1)
    svg.write_picture(path, LEFT + width + 28 + legend_width, below, elements)


def pass_colour(kind: Kind, chunk: int, num_chunks: int) -> str:
    """The colour of a pass through a stage's chunk; later chunks are darker."""
    depth = chunk / (num_chunks - 1) - 0.5 if num_chunks > 1 else 0.0
    return svg.colour(get_args(Kind).index(kind), 3, shade=-0.2 * depth)


def _drawn(timeline: PipelineTimeline, lanes: int) -> tuple[list[tuple[int, TimedPass]], list[str]]:
    """The passes to draw, with their stages, and what is said of the others."""
    notes = []
    if left := timeline.plan.num_stages - lanes:
        notes.append(f"Not drawn: {left:,} more stages.")
    found = [(stage, timed) for stage in range(lanes) for timed in timeline.passes[stage]]
    if len(found) > MAX_PASSES:
        found.sort(key=lambda item: item[1].start)
        notes.append(f"Not drawn: the {len(found) - MAX_PASSES:,} last passes.")
    return found[:MAX_PASSES], notes


def _lane(stage: int) -> float:
    """The upper edge of a stage's lane."""
    return TOP + stage * (LANE + GAP)


def _labels(lanes: int) -> Iterator[str]:
    for stage in range(lanes):
        middle = _lane(stage) + LANE / 2 + 4
        yield svg.text(LEFT - 8, middle, f"stage {stage}", 'text-anchor="end"')


def _passes(drawn: list[tuple[int, TimedPass]], scale: float, num_chunks: int) -> Iterator[str]:
    """The boxes of each kind and chunk as one path, and the numbers where there is room."""
    boxes: dict[tuple[Kind, int], str] = {}
    numbers = []
    for stage, (action, start, end) in drawn:
        a, b, top = LEFT + start * scale, LEFT + end * scale, _lane(stage)
        key = action.kind, action.chunk
        boxes[key] = boxes.get(key, "") + svg.rectangle(a, b, top, top + LANE)
        label = str(action.microbatch)
        if b - a >= SMALL_LETTER * len(label) + 4:
            numbers.append(svg.text((a + b) / 2, top + LANE / 2 + 4, label))
    for (kind, chunk), data in sorted(boxes.items()):
        colour = pass_colour(kind, chunk, num_chunks)
        yield f'<path class="{kind}" fill="{colour}" stroke="#fff" stroke-width="0.8" d="{data}"/>'
    yield f'<g text-anchor="middle" font-size="10">{"".join(numbers)}</g>'


def _keys(num_chunks: int) -> Iterator[str]:
    """What the colours stand for."""
    x, y = LEFT, 25 + 2 * LINE
    for kind in get_args(Kind):
        for chunk in range(min(num_chunks, MAX_KEYS)):
            colour = pass_colour(kind, chunk, num_chunks)
            label = f"{kind}, chunk {chunk}" if num_chunks > 1 else kind
            yield f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colour}"/>'
            yield svg.text(x + 18, y, label)
            x += 18 + math.ceil(LETTER * len(label)) + 14
        x, y = (LEFT, y + LINE) if num_chunks > 1 else (x, y)


def _legend(timeline: PipelineTimeline, lanes: int, left: float) -> tuple[list[str], int]:
    """The table of stages, whose rows lie beside the lanes, and its width."""
    rows = [COLUMNS, *(cells(timeline, stage) for stage in range(lanes))]
    x, lines = left, []
    for column in zip(*rows):
        x += math.ceil(LETTER * max(map(len, column))) + 14
        for number, cell in enumerate(column):
            y = _lane(number - 1) + LANE / 2 + 4
            lines.append(svg.text(x - 14, y, cell, 'text-anchor="end"'))
    return lines, math.ceil(x - left)
