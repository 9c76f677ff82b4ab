"""The passes of a stage in words stand for exactly its passes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.plan.pipeline import Action, PipelinePlan
from cp_megatron.plan.pipeline_timeline import PipelineTimeline
from cp_megatron.plan.show.pipeline_text import cells, passes_in_words
from tests.plan.cases import property_settings
from tests.plan.test_pipeline import plans


def read(word: str) -> Iterator[Action]:
    """The passes that a word such as ``F0-2.1`` stands for."""
    found = re.fullmatch(r"([FB])(\d+)(?:-(\d+))?(?:\.(\d+))?", word)
    assert found, word
    letter, first, last, chunk = found.groups()
    for microbatch in range(int(first), int(last or first) + 1):
        yield Action("forward" if letter == "F" else "backward", microbatch, int(chunk or 0))


def expand(words: str) -> Iterator[Action]:
    for run in words.split("  "):
        first, dots, last = run.partition(" ... ")
        if not dots:
            for word in run.split(" "):
                yield from read(word)
            continue
        pair, stop = ([next(read(word)) for word in x.split(" ")] for x in (first, last))
        for more in range(stop[0].microbatch - pair[0].microbatch + 1):
            yield from (x._replace(microbatch=x.microbatch + more) for x in pair)


@given(plans(), st.data())
@property_settings(100)
def test_words_stand_for_the_passes(plan: PipelinePlan, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, plan.num_stages - 1))
    words = passes_in_words(plan, stage)
    assert tuple(expand(words)) == plan.actions(stage)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (PipelinePlan(1, 1), "F0  B0"),
        (PipelinePlan(4, 8), "F0-3  B0 F4 ... B3 F7  B4-7"),
        (PipelinePlan(4, 8, has_backward=False), "F0-7"),
        (PipelinePlan(4, 8, 2, has_backward=False), "F0-3.0  F0-3.1  F4-7.0  F4-7.1"),
        (
            PipelinePlan(4, 8, 2),
            "F0-3.0  F0-3.1  F4-6.0  B0.1  F7.0  B1.1 F4.1 ... B3.1 F6.1  B0.0  F7.1  B1-3.0  "
            "B4-7.1  B4-7.0",
        ),
    ],
)
def test_words_literally(plan: PipelinePlan, words: str) -> None:
    assert passes_in_words(plan, 0) == words


def test_the_row_of_a_stage_literally() -> None:
    timeline = PipelineTimeline.simulate(PipelinePlan(4, 8, 2))
    assert cells(timeline, 0) == ("0", "15.8%", "11", "24", "24")
    assert cells(timeline, 2) == ("2", "15.8%", "7", "32", "32")
