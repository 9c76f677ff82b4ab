"""The tables of launch/README.md about other trainers say what the program does."""

from __future__ import annotations

import re
from pathlib import Path

from cp_megatron.cli.megatron_answers import Answer, Noted, Refused, Renamed, Translated
from cp_megatron.cli.megatron_flags import answer_to
from cp_megatron.cli.synonyms import SYNONYMS

PAGE = (Path(__file__).parents[2] / "launch" / "README.md").read_text("utf-8")
(SECTION,) = re.findall(r"\n## Coming from .*?(?=\n## )", PAGE, re.DOTALL)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.splitlines()
    if line.startswith("| ") and "`" in line
]


def told(answer: Answer) -> str:
    """The text of a row about it."""
    match answer:
        case Noted(reason):
            return f"no effect: {reason}"
        case Renamed(new):
            return new
        case Translated(words):
            return words
        case Refused(reason, works):
            return f"refused: {reason}; {works}"
    return ""


def test_every_row_about_megatron_is_the_answer() -> None:
    rows = [row for row in ROWS if len(row) == 2]
    assert len(rows) > 20
    for names, text in rows:
        for flag in re.findall(r"`(--[\w-]+)`", names):
            answer = answer_to(flag)
            assert answer is not None, flag
            assert told(answer) == text.replace("`", ""), flag


def test_every_row_about_another_trainer_is_the_answer() -> None:
    rows = [row for row in ROWS if len(row) == 3]
    assert len(rows) > 20
    for trainer, name, text in rows:
        assert SYNONYMS[trainer][name.strip("`-")] == text.replace("`", "")
