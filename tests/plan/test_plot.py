"""The picture is well-formed and shows exactly the attended area in every rank's colour."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import pytest

from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.plot import SIDE

SVG = "{http://www.w3.org/2000/svg}"


def area(points: str) -> float:
    """Of a polygon, by the shoelace formula."""
    corners = [tuple(map(float, point.split(","))) for point in points.split()]
    turns = zip(corners, [*corners[1:], corners[0]])
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in turns)) / 2


def drawn(mask: Mask, cp_size: int, kind: str, folder: Path) -> dict[str, float]:
    """Area per colour, as a share of the whole matrix."""
    schedule = Schedule.build(mask, SequenceLayout.make(mask, cp_size, kind))
    schedule.plot(str(folder / "plan.svg"))
    root = ET.parse(folder / "plan.svg").getroot()
    assert root.tag == f"{SVG}svg"
    text = " ".join(element.text or "" for element in root.iter(f"{SVG}text"))
    for rank in range(cp_size):
        assert f"rank {rank}: {schedule.pairs(rank):,} pairs" in text
    shares: dict[str, float] = defaultdict(float)
    for polygon in root.iter(f"{SVG}polygon"):
        shares[polygon.attrib["fill"]] += area(polygon.attrib["points"]) / SIDE**2
    return shares


@pytest.mark.parametrize(
    ("mask", "cp_size", "kind", "share"),
    [
        (Mask.causal(64), 4, "zigzag", 1 / 2),
        (Mask.causal(64), 4, "contiguous", 1 / 2),
        (Mask.full(64), 4, "contiguous", 1),
        (Mask.documents([32, 32]), 2, "zigzag", 1 / 4),
        (Mask.causal(64), 1, "zigzag", 1 / 2),
    ],
)
def test_the_drawn_area_is_the_mask(
    mask: Mask, cp_size: int, kind: str, share: float, tmp_path: Path
) -> None:
    shares = drawn(mask, cp_size, kind, tmp_path)
    assert len(shares) == cp_size
    assert sum(shares.values()) == pytest.approx(share, rel=1e-3)
    if kind == "zigzag":
        assert max(shares.values()) == pytest.approx(min(shares.values()), rel=1e-3)


@pytest.mark.parametrize("window", [(3, 0), (0, 0)])
def test_windows_are_drawn_too(window: tuple[int, int], tmp_path: Path) -> None:
    assert len(drawn(Mask.causal(32, window=window), 4, "zigzag", tmp_path)) == 4
