"""A picture of a plan of states: which rank holds which pieces, and where states go.

Each rank has a lane, in which its pieces lie at their positions in the row. A dark line follows the
state of each document that is on several pieces, from where the document starts to where it ends:
it passes along a piece and then, at its end, into the lane of the rank with the next one. The
strip on top shows the documents.

The size of the file is bounded: only the widest pieces and the longest chains are drawn, and notes
say how many others there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.show import svg
from cp_megatron.plan.show.summary import mask_in_words, numbers
from cp_megatron.plan.show.svg import LETTER, LINE, SMALL_LETTER
from cp_megatron.plan.show.text import in_bytes
from cp_megatron.plan.states import Piece, StatePlan, StateSize

WIDTH, LEFT, TOP, LANE, GAP, STRIP = 720, 76, 112, 20, 12, 10  # pixels
MAX_LANES = 64
MAX_PIECES = MAX_CHAINS = 4000
_HEADER = (
    *("rank", "pieces", "in", "out", "M", "heads"),
    *("forward: U, M", "then S", "backward: dS", "then dS"),
)


def write_states_svg(
    plan: StatePlan, mask: Mask, layout: SequenceLayout, size: StateSize, path: str
) -> None:
    """Writes the picture to the file ``path``. The same plan always gives the same bytes.

    Args:
        plan: pieces and chains.
        mask: the documents.
        layout: which rank holds which tokens.
        size: elements of a head's transition and state, and their bytes.
        path: of the file.
    """
    lanes = min(layout.cp_size, MAX_LANES)
    bottom = TOP + lanes * (LANE + GAP)
    pieces, chains, notes = _drawn(plan, lanes)
    scale = WIDTH / mask.seq_len
    legend, width = _legend(plan, size, lanes)
    notes = [*_explanations(), *notes]
    total = f"{len(plan.pieces):,} pieces, {len(plan.chains):,} chains, {plan.longest_chain} pieces"
    elements = [
        svg.text(LEFT, 24, f"states, {layout.kind} on {layout.cp_size} ranks", 'font-size="16"'),
        svg.text(LEFT, 25 + LINE, f"{mask_in_words(mask)}; {mask.seq_len:,} tokens"),
        svg.text(LEFT, 25 + 2 * LINE, f"{total} in the longest; {plan.heads[-1][1]} heads"),
        *_documents(mask, scale, bottom),
        *_lanes(pieces, lanes, layout.cp_size, scale),
        *_chains(chains, plan.pieces, mask, scale),
        *legend,
        *(svg.text(LEFT, bottom + LINE * (i + 1), note) for i, note in enumerate(notes)),
    ]
    below = max(bottom + LINE * (len(notes) + 1), TOP + LINE * (lanes + 3))
    svg.write_picture(path, LEFT + WIDTH + 28 + width, below, elements)


def _explanations() -> list[str]:
    return [
        "Colour and lane: the rank that holds the piece. Dark lines: states, from the start of a "
        "document to its end.",
        "Bytes of one layer and row that a rank receives, per message. M: transitions that it "
        "computes, one per piece within a document.",
        "Strip on top: documents.",
    ]


def _drawn(
    plan: StatePlan, lanes: int
) -> tuple[list[tuple[int, Piece]], list[tuple[int, ...]], list[str]]:
    """Selects the pieces, with their numbers, and the chains to draw, and says what is left out."""
    notes = []
    if lanes < (size := len(plan.heads)):
        notes.append(f"Not drawn: {size - lanes:,} more ranks.")
    held = [(i, piece) for i, piece in enumerate(plan.pieces) if piece.rank < lanes]
    if len(held) > MAX_PIECES:
        held.sort(key=lambda item: item[1].start - item[1].stop)
        notes.append(f"Not drawn: the {len(held) - MAX_PIECES:,} shortest pieces.")
    chains = [
        chain for chain in plan.chains if all(plan.pieces[number].rank < lanes for number in chain)
    ]
    chains.sort(key=len, reverse=True)
    links, shown = 0, 0
    while shown < len(chains) and links + len(chains[shown]) <= MAX_CHAINS:
        links, shown = links + len(chains[shown]), shown + 1
    if shown < len(plan.chains):
        notes.append(f"Not drawn: {len(plan.chains) - shown:,} chains.")
    return held[:MAX_PIECES], chains[:shown], notes


def _lane(rank: int) -> float:
    """The upper edge of a rank's lane."""
    return TOP + rank * (LANE + GAP)


def _documents(mask: Mask, scale: float, bottom: float) -> Iterator[str]:
    """Draws the strip of documents, and lines at the starts of those wide enough to be seen."""
    edges = [edge * scale for edge in mask.starts.tolist()]
    strip, lines, last = ["", ""], "", -math.inf
    for i, (a, b) in enumerate(pairwise(edges)):
        if b - a >= 1:
            strip[i % 2] += svg.rectangle(LEFT + a, LEFT + b, TOP - STRIP - 8, TOP - 8)
        if a - last >= 3:
            lines += f"M{svg.number(LEFT + a)} {TOP - 8}V{svg.number(bottom - GAP)}"
            last = a
    for data, fill in zip(strip, ("#9aa7b5", "#d5dce4")):
        if data:
            yield f'<path class="documents" fill="{fill}" d="{data}"/>'
    yield f'<path fill="none" stroke="#bbb" stroke-width="0.6" d="{lines}"/>'


def _lanes(
    pieces: Sequence[tuple[int, Piece]], lanes: int, size: int, scale: float
) -> Iterator[str]:
    """Draws the pieces of each rank, with their numbers where there is room."""
    data, labels = [""] * lanes, []
    for number, piece in pieces:
        a, b, top = piece.start * scale, piece.stop * scale, _lane(piece.rank)
        data[piece.rank] += svg.rectangle(LEFT + a, LEFT + b, top, top + LANE)
        if b - a >= SMALL_LETTER * len(str(number)) + 6:
            labels.append(svg.text(LEFT + (a + b) / 2, top + 8, str(number)))
    for rank, path in enumerate(data):
        label = f"rank {rank}"
        yield svg.text(LEFT - 8, _lane(rank) + LANE / 2 + 4, label, 'text-anchor="end"')
        fill = svg.colour(rank, size)
        yield f'<path class="pieces" fill="{fill}" stroke="#fff" stroke-width="0.5" d="{path}"/>'
    yield f'<g text-anchor="middle" font-size="9">{"".join(labels)}</g>'


def _chains(
    chains: Sequence[tuple[int, ...]], pieces: Sequence[Piece], mask: Mask, scale: float
) -> Iterator[str]:
    """Draws each chain as a line that ends in an arrow head."""
    for chain in chains:
        first, last = pieces[chain[0]], pieces[chain[-1]]
        # The document is that of the first position that the last piece holds.
        document = int(mask.starts.searchsorted(last.start, side="right")) - 1
        start, stop = (int(mask.starts[document + i]) * scale for i in (0, 1))
        data = f"M{svg.number(LEFT + start)} {svg.number(_middle(first))}"
        for number in chain[1:]:
            piece = pieces[number]
            across = svg.number(LEFT + piece.start * scale)
            data += f"H{across}V{svg.number(_middle(piece))}"
        end = LEFT + stop
        data += f"H{svg.number(end)}"
        y = _middle(last)
        head = svg.path_of([(end, y), (end - 4, y - 2.5), (end - 4, y + 2.5)])
        yield f'<path class="chain" fill="none" stroke="#222" d="{data}"/>'
        yield f'<path fill="#222" d="{head}"/>'


def _middle(piece: Piece) -> float:
    """Where the line of a state passes: below the piece's number."""
    return _lane(piece.rank) + LANE * 0.7


def _legend(plan: StatePlan, size: StateSize, lanes: int) -> tuple[list[str], int]:
    """The table of ranks and the width that it takes."""
    rows: list[tuple[str, ...]] = [_HEADER]
    held = [0] * len(plan.heads)
    for piece in plan.pieces:
        held[piece.rank] += 1
    for rank in range(lanes):
        span = plan.heads[rank]
        counts = (held[rank], *(len(x[rank]) for x in (plan.entering, plan.leaving, plan.through)))
        moved = [
            plan.messages_received(rank, size, backward=backward) for backward in (False, True)
        ]
        rows.append(
            (
                *(f"{count:,}" for count in (rank, *counts)),
                numbers(span) if span[1] > span[0] else "none",
                *(in_bytes(part) for of_pass in moved for part in of_pass),
            )
        )
    x, lines = LEFT + WIDTH + 28 + 18, []
    for column in zip(*rows):
        x += math.ceil(LETTER * max(map(len, column))) + 14
        for i, cell in enumerate(column):
            y = TOP - LINE + LINE * i + 10
            lines.append(svg.text(x - 14, y, cell, 'text-anchor="end"'))
    for rank in range(lanes):
        y, fill = TOP + LINE * rank, svg.colour(rank, len(plan.heads))
        lines.append(
            f'<rect x="{LEFT + WIDTH + 28}" y="{y}" width="12" height="12" fill="{fill}"/>'
        )
    return lines, x - LEFT - WIDTH - 28 + 6
