"""The progress of an evaluation: a line per section, one every half minute, and the time left."""

from __future__ import annotations

import pytest
from rich.console import Console

from cp_megatron.evaluate.row_progress import RowProgress, Section, duration

SECTIONS = [
    Section(name="512 tokens, perplexity", rows=4, cost=1.0),
    Section(name="8,192 tokens, needle", rows=2, cost=48.0),
]


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def told(terminal: bool, capsys: pytest.CaptureFixture[str], *, quiet: bool = False) -> list[str]:
    """The lines of an evaluation whose every unit of cost takes a second."""
    clock = Clock()
    console = Console(width=90, force_terminal=terminal, no_color=True, legacy_windows=False)
    with RowProgress(SECTIONS, console, quiet=quiet, clock=clock) as progress:
        for section in SECTIONS:
            for row in range(section.rows):
                progress.rows_done(row)
                clock.now += section.cost
            progress.section_done()
    lines = capsys.readouterr().out.replace("\x1b[2K", "").replace("\r", "").splitlines()
    return [line.rstrip() for line in lines]


def test_lines_say_what_is_done_and_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert told(False, capsys) == [
        "scores     6 rows; data and model are loaded",
        "512 tokens, perplexity: 4 rows in 4.0 s, 4% done, about 2 min left",
        "8,192 tokens, needle: row 1 of 2, 52% done, about 48 s left",
        "8,192 tokens, needle: 2 rows in 2 min, all done",
    ]


def test_a_terminal_has_a_bar_too(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(True, capsys)
    assert any("512 tokens, perplexity: 4 rows in 4.0 s" in line for line in lines)
    assert any("100%" in line or "━" in line for line in lines)


def test_the_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(True, capsys, quiet=True) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (61, "61 s"),
        (89.6, "90 s"),
        (91, "2 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
