"""The picture of a pipeline shows every pass in its stage's lane, at its time, with its number."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import get_args

import pytest

from cp_megatron.plan.pipeline import Kind, PipelinePlan
from cp_megatron.plan.pipeline_timeline import PipelineTimeline
from cp_megatron.plan.show import pipeline_plot
from cp_megatron.plan.show.pipeline_plot import (
    GAP,
    LANE,
    LEFT,
    TOP,
    pass_colour,
    write_pipeline_svg,
)
from tests.plan.show.test_plot import SVG, polygons, texts


def drawn(plan: PipelinePlan, folder: Path) -> tuple[PipelineTimeline, ET.Element]:
    timeline, path = PipelineTimeline.simulate(plan), folder / "pipeline.svg"
    write_pipeline_svg(timeline, str(path))
    first = path.read_bytes()
    write_pipeline_svg(timeline, str(path))
    assert path.read_bytes() == first
    return timeline, ET.parse(path).getroot()


def passes(root: ET.Element) -> list[ET.Element]:
    return [path for path in root.iter(f"{SVG}path") if path.attrib["class"] in get_args(Kind)]


@pytest.mark.parametrize(
    "plan", [PipelinePlan(4, 8), PipelinePlan(2, 5, 3), PipelinePlan(1, 1), PipelinePlan(3, 70, 2)]
)
def test_passes_lie_at_their_times(plan: PipelinePlan, tmp_path: Path) -> None:
    timeline, root = drawn(plan, tmp_path)
    found: dict[str, list[tuple[int, float, float]]] = {}
    for path in passes(root):
        for corners in polygons(path.attrib["d"]):
            xs, ys = zip(*corners)
            assert max(ys) - min(ys) == LANE
            stage = round((min(ys) - TOP) / (LANE + GAP))
            found.setdefault(path.attrib["fill"], []).append((stage, min(xs), max(xs)))
    last = max(x for boxes in found.values() for *_, x in boxes)
    scale = (last - LEFT) / timeline.duration
    expected: dict[str, list[tuple[int, float, float]]] = {}
    for stage, timed in enumerate(timeline.passes):
        for action, start, end in timed:
            colour = pass_colour(action.kind, action.chunk, plan.num_chunks)
            box = stage, LEFT + start * scale, LEFT + end * scale
            expected.setdefault(colour, []).append(box)
    assert len(expected) == 2 * plan.num_chunks
    assert found.keys() == expected.keys()
    for colour, boxes in expected.items():
        assert len(found[colour]) == len(boxes)
        for one, other in zip(found[colour], boxes):
            assert one == pytest.approx(other, abs=0.02)


def test_numbers_and_words(tmp_path: Path) -> None:
    _, root = drawn(PipelinePlan(2, 3, 2), tmp_path)
    words = texts(root)
    (group,) = [x for x in root.iter(f"{SVG}g") if x.attrib.get("text-anchor") == "middle"]
    labels = [text.text for text in group]
    assert {label: labels.count(label) for label in labels} == {"0": 8, "1": 8, "2": 8}
    for text in (
        *("interleaved 1F1B, 2 stages of 2 chunks each, 3 micro batches", "stage 0", "stage 1"),
        *("forward, chunk 0", "backward, chunk 1", "in flight", "14.3%", "received"),
        "bubble 14.3% of the time, if a backward pass takes as long as two forward passes",
    ):
        assert text in words


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_plot, "MAX_PASSES", 100)
    monkeypatch.setattr(pipeline_plot, "MAX_LANES", 3)
    _, root = drawn(PipelinePlan(5, 20), tmp_path)
    words = texts(root)
    assert "Not drawn: 2 more stages." in words
    assert "Not drawn: the 20 last passes." in words
    boxes = [corners for path in passes(root) for corners in polygons(path.attrib["d"])]
    assert len(boxes) == 100
    assert "stage 3" not in words
