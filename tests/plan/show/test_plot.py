"""The picture is well-formed and legible, and shows the mask in the colours of the ranks."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.show import plot
from cp_megatron.plan.show.plot import LETTER, SIDE, group_colour, rank_colour
from tests.plan.show.test_shapes import area

SVG = "{http://www.w3.org/2000/svg}"
DOCUMENTS = [1838, 32, 700, 900, 4, 1500, 1200, 1050, 968]


def schedule_of(mask: Mask, cp_size: int, kind: str = "auto", **options: object) -> Schedule:
    return Schedule.build(mask, SequenceLayout.make(mask, cp_size, kind), **options)  # type: ignore[arg-type]


def drawn(schedule: Schedule, folder: Path) -> ET.Element:
    schedule.plot(str(folder / "plan.svg"))
    root = ET.parse(folder / "plan.svg").getroot()
    assert root.tag == f"{SVG}svg"
    return root


def polygons(data: str) -> list[list[tuple[float, float]]]:
    """The closed polygons of path data with absolute corners."""
    found = []
    for part in data.split("z")[:-1]:
        numbers = [float(number) for number in part.removeprefix("M").split()]
        found.append(list(zip(numbers[::2], numbers[1::2])))
    return found


def shares(root: ET.Element) -> dict[str, float]:
    """Area of the patches per colour, as a share of the whole matrix."""
    found: dict[str, float] = defaultdict(float)
    for group in root.iter(f"{SVG}g"):
        for path in group.findall(f"{SVG}path"):
            if "fill" in group.attrib and "class" not in path.attrib:
                pieces = sum(area(corners) for corners in polygons(path.attrib["d"]))
                found[group.attrib["fill"]] += pieces / SIDE**2
    return found


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


CASES = {
    "causal": schedule_of(Mask.causal(64), 4, "zigzag"),
    "contiguous": schedule_of(Mask.causal(64), 4, "contiguous", route="direct"),
    "full": schedule_of(Mask.full(64), 4),
    "chosen": schedule_of(Mask.full(64), 4, exchange="auto", num_heads=8, num_kv_heads=2),
    "one rank": schedule_of(Mask.causal(64), 1),
    "documents": schedule_of(Mask.documents([32, 32]), 2, "zigzag"),
    "window": schedule_of(Mask.causal(4096, window=(700, 0)), 4, "contiguous"),
    "both sides": schedule_of(Mask.documents([40, 20, 36], False, (6, 3)), 4, "zigzag"),
    "sixteen": schedule_of(Mask.documents(DOCUMENTS), 16, "zigzag", route="direct"),
    "twenty-four": schedule_of(Mask.causal(96), 24, "zigzag"),
    "gather": schedule_of(Mask.causal(4096), 8, exchange="all_gather"),
    "a2a": schedule_of(Mask.causal(96), 4, exchange="a2a", num_heads=12, num_kv_heads=3),
    "a2a+p2p": schedule_of(
        Mask.causal(96), 8, exchange="a2a+p2p", num_heads=8, hierarchical_sizes=(2, 4)
    ),
}
EVERY = pytest.mark.parametrize("schedule", CASES.values(), ids=CASES.keys())


@EVERY
def test_the_area_of_each_colour_is_its_share(schedule: Schedule, tmp_path: Path) -> None:
    found = shares(drawn(schedule, tmp_path))
    size = schedule.all_to_all_size
    for group in range(schedule.group_layout.cp_size):
        share = schedule.pairs(group * size) / schedule.mask.seq_len**2
        assert found.pop(group_colour(schedule, group)) == pytest.approx(share, abs=1e-4, rel=1e-3)
    assert not found


@EVERY
def test_the_edges_show_the_owners(schedule: Schedule, tmp_path: Path) -> None:
    edges = {
        path.attrib["fill"]: polygons(path.attrib["d"])
        for path in drawn(schedule, tmp_path).iter(f"{SVG}path")
        if path.attrib.get("class") == "edge"
    }
    scale = SIDE / schedule.mask.seq_len
    for rank, chunks in enumerate(schedule.layout.chunks):
        found = edges.pop(rank_colour(schedule, rank))
        above = [corners for corners in found if max(y for _, y in corners) < plot.TOP]
        left = [corners for corners in found if max(x for x, _ in corners) < plot.LEFT]
        for place, origin, side in ((above, plot.LEFT, 0), (left, plot.TOP, 1)):
            spans = [(min(c[side] for c in p), max(c[side] for c in p)) for p in place]
            expected = [(origin + a * scale, origin + b * scale) for a, b in chunks]
            assert np.allclose(spans, expected, atol=0.01)
    assert not edges


@EVERY
def test_no_text_lies_on_another_or_outside(schedule: Schedule, tmp_path: Path) -> None:
    root = drawn(schedule, tmp_path)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = []
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in root.iter(f"{SVG}text"):
        if "transform" in element.attrib or not element.text:
            continue
        style = {**parents[element].attrib, **element.attrib}
        size, anchor = float(style.get("font-size", 12)), style.get("text-anchor")
        length = len(element.text) * LETTER * size / 12 * 0.9
        shift = {"middle": 0.5, "end": 1.0}.get(str(anchor), 0.0)
        x, y = float(element.attrib["x"]) - shift * length, float(element.attrib["y"])
        tail = 0.0 if element.text.isdigit() else 0.2
        boxes.append((x, x + length, y - 0.75 * size, y + tail * size, element.text))
    for index, (x0, x1, y0, y1, text) in enumerate(boxes):
        assert min(x0, y0, width - x1, height - y1) >= 0, text
        for a0, a1, b0, b1, other in boxes[:index]:
            assert x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0, (text, other)


@EVERY
def test_numbers_fit_into_their_patches(schedule: Schedule, tmp_path: Path) -> None:
    for group in drawn(schedule, tmp_path).iter(f"{SVG}g"):
        paths = [p.attrib["d"] for p in group.findall(f"{SVG}path") if "class" not in p.attrib]
        corners = [np.asarray(polygon) for data in paths for polygon in polygons(data)]
        for text in group.findall(f"{SVG}g/{SVG}text"):
            half = LETTER * len(str(text.text)) / 2
            x, y = float(text.attrib["x"]), float(text.attrib["y"])
            low, high = (x - half, y - 9), (x + half, y + 1)
            assert any((c.min(0) <= low).all() and (c.max(0) >= high).all() for c in corners)


def test_rounds_and_shares_are_shown(tmp_path: Path) -> None:
    found = texts(drawn(CASES["causal"], tmp_path))
    assert found[:2] == ["zigzag on 4 ranks, p2p over the ring", "causal; 64 tokens"]
    assert found.count("0") == 1 + 2 * 2 + 12, "legend, edges, own keys: three patches a rank"
    assert found.count("520") == 4, "pairs of each rank"
    assert found.count("1.000") == 4
    assert {"48", "40", "32", "24"} <= set(found), "keys received"
    assert "all receive 144 keys" in found


def test_groups_show_the_heads_of_a_rank(tmp_path: Path) -> None:
    found = texts(drawn(CASES["a2a"], tmp_path))
    assert found[1] == "causal; 96 tokens, 12 query and 3 key/value heads"
    assert [text for text in found if text.startswith("q ")] == [
        "q 0-2, kv 0", "q 3-5, kv 0-1", "q 6-8, kv 1-2", "q 9-11, kv 2",
    ]  # fmt: skip
    title, *_ = texts(drawn(CASES["a2a+p2p"], tmp_path))
    assert title == "zigzag on 8 ranks, a2a among 2, p2p over the ring between 4 groups"


def test_the_same_schedule_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        schedule_of(Mask.documents(DOCUMENTS), 16).plot(str(tmp_path / name))
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_documents_below_a_pixel_are_drawn_together(tmp_path: Path) -> None:
    """5,000 documents of 40 tokens are one pixel after the other along the diagonal."""
    schedule = schedule_of(Mask.documents([40] * 5_000), 2, "contiguous")
    root = drawn(schedule, tmp_path)
    assert "Drawn together, one colour a pixel: 5,000 areas below a pixel." in texts(root)
    assert (tmp_path / "plan.svg").stat().st_size < 40_000
    pixels = [p.attrib["d"] for p in root.iter(f"{SVG}path") if p.attrib.get("class") == "pixels"]
    cells = re.findall(r"M(\d+) (\d+)h1v1h-1z", "".join(pixels))
    assert sorted(int(x) for x, _ in cells) == [plot.LEFT + i for i in range(SIDE)]
    assert all(int(x) - plot.LEFT == int(y) - plot.TOP for x, y in cells)


def test_a_pixel_belongs_to_the_rank_with_most_of_it(tmp_path: Path) -> None:
    """Ten one-token documents share a pixel: rank 0 has 7 of the first ten, rank 1 of the last."""
    chunks = (((0, 7), (10, 3203)), ((7, 10), (3203, 6400)))
    schedule = Schedule.build(Mask.documents([1] * 6400), SequenceLayout(chunks, "by hand"))
    root = drawn(schedule, tmp_path)
    for rank, pixels in enumerate((range(320), range(320, SIDE))):
        colour = rank_colour(schedule, rank)
        (path,) = root.findall(f"{SVG}g[@fill='{colour}']/{SVG}path")
        columns = re.findall(r"M(\d+) ", path.attrib["d"])
        assert [int(x) - plot.LEFT for x in columns] == list(pixels)


def test_omitted_areas_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "MAX_PATCHES", 20)
    found = texts(drawn(schedule_of(Mask.causal(256), 4, "zigzag"), tmp_path))
    (note,) = [text for text in found if text.startswith("Not drawn")]
    assert re.fullmatch(r"Not drawn: the \d+ smallest areas, \d+\.\d\d% of the pairs\.", note)


def test_many_ranks_have_colours_of_their_own_and_a_short_legend(tmp_path: Path) -> None:
    for size in (2, 7, 8, 9, 16, 64):
        schedule = schedule_of(Mask.documents([2] * size), size)
        assert len({rank_colour(schedule, rank) for rank in range(size)}) == size
    found = texts(drawn(schedule, tmp_path))
    assert "and 35 more ranks" in found
