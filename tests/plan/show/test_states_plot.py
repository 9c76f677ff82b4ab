"""The picture of states shows every piece, and each document's state from its start to its end."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

from cp_megatron.plan import Mask, SequenceLayout
from cp_megatron.plan.show import states_plot, svg
from cp_megatron.plan.show.states_plot import GAP, LANE, LEFT, TOP, WIDTH, write_states_svg
from cp_megatron.plan.states import StatePlan, StateSize
from tests.plan.show.test_plot import SVG, polygons, texts

DOCUMENTS = (900, 100, 3000, 96, 20, 1884)
SIZE = StateSize.of(128, 128, "matrix")


def drawn(mask: Mask, layout: SequenceLayout, folder: Path) -> tuple[StatePlan, ET.Element]:
    plan = StatePlan.of(mask, layout, 32)
    path = folder / "states.svg"
    write_states_svg(plan, mask, layout, SIZE, str(path))
    first = path.read_bytes()
    write_states_svg(plan, mask, layout, SIZE, str(path))
    assert path.read_bytes() == first
    return plan, ET.parse(path).getroot()


def paths(root: ET.Element, kind: str) -> list[ET.Element]:
    return [path for path in root.iter(f"{SVG}path") if path.attrib.get("class") == kind]


@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "balanced"])
def test_pieces_lie_in_the_lanes_of_their_ranks(kind: str, tmp_path: Path) -> None:
    mask = Mask.documents(DOCUMENTS)
    layout = SequenceLayout.make(mask, 4, kind)
    _, root = drawn(mask, layout, tmp_path)
    scale = WIDTH / mask.seq_len
    for rank, path in enumerate(paths(root, "pieces")):
        assert path.attrib["fill"] == svg.colour(rank, 4)
        corners = polygons(path.attrib["d"])
        top = TOP + rank * (LANE + GAP)
        assert {y for polygon in corners for _, y in polygon} == {top, top + LANE}
        width = sum(max(x for x, _ in p) - min(x for x, _ in p) for p in corners)
        assert width == pytest.approx(layout.shard_len * scale, abs=0.1)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "balanced"])
def test_lines_follow_the_chains(kind: str, tmp_path: Path) -> None:
    mask = Mask.documents(DOCUMENTS)
    plan, root = drawn(mask, SequenceLayout.make(mask, 4, kind), tmp_path)
    scale, edges = WIDTH / mask.seq_len, mask.starts.tolist()
    found = []
    for path in paths(root, "chain"):
        x = [float(n) for n in re.findall(r"[MH]([\d.]+)", path.attrib["d"])]
        y = [float(n) for n in re.findall(r"(?:V|M[\d.]+ )([\d.]+)", path.attrib["d"])]
        begin, end = (round((place - LEFT) / scale) for place in (x[0], x[-1]))
        found.append(((begin, end), x[1:-1], [int((place - TOP) // (LANE + GAP)) for place in y]))
    expected = [
        (
            next(x for x in pairwise(edges) if x[0] < plan.pieces[chain[1]].start < x[1]),
            [pytest.approx(LEFT + plan.pieces[n].start * scale, abs=0.01) for n in chain[1:]],
            [plan.pieces[number].rank for number in chain],
        )
        for chain in sorted(plan.chains, key=len, reverse=True)
    ]
    assert found == expected


def test_the_bytes_of_both_messages(tmp_path: Path) -> None:
    """Two ranks, zigzag: rank 0 gives one U and receives M and U, and S of its last piece."""
    mask = Mask.causal(4096)
    plan, root = drawn(mask, SequenceLayout.make(mask, 2, "zigzag"), tmp_path)
    assert plan.messages_received(0, SIZE) == (2 * 16 * 128 * 128 * 4, 16 * 128 * 128 * 4)
    for words in ("2 MiB", "1 MiB", "0-15", "16-31", "rank 0", "rank 1"):
        assert any(text.replace(".0", "") == words for text in texts(root)), words


def test_the_file_is_bounded(tmp_path: Path) -> None:
    """Tokens dealt one by one to 100 ranks."""
    mask, size = Mask.causal(20_000), 100
    dealt = tuple(tuple((i, i + 1) for i in range(r, mask.seq_len, size)) for r in range(size))
    _, root = drawn(mask, SequenceLayout(dealt, "contiguous"), tmp_path)
    assert (tmp_path / "states.svg").stat().st_size < 1 << 20
    assert len(paths(root, "pieces")) == states_plot.MAX_LANES
    words = " ".join(texts(root))
    for note in ("36 more ranks", "8,800 shortest pieces", "1 chains"):
        assert f"Not drawn: {note}" in words or f"Not drawn: the {note}" in words
