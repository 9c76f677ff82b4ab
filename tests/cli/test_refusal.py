"""A mistake ends in one line and code 2, printed by one rank."""

from __future__ import annotations

import os
import signal

import pytest

from cp_megatron.cli import refusal
from cp_megatron.cli.refusal import error_line
from cp_megatron.errors import CombinedError, ConfigError


@pytest.mark.parametrize(
    ("rank", "ended", "printed"),
    [
        (0, False, "p: error: --lr 2: rule\n"),
        (0, True, "p: error: --lr 2: rule\n"),
        (1, True, ""),  # rank 0 has printed it
        (1, False, "p (rank 1): error: --lr 2: rule\n"),  # rank 0 has not found it
    ],
)
def test_an_error_is_printed_once(
    rank: int,
    ended: bool,
    printed: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sleep(seconds: float) -> None:
        if ended:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(refusal, "SECONDS_FOR_RANK_0", 0.1)
    monkeypatch.setattr(refusal.time, "sleep", sleep)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert refusal.refuse(ConfigError("--lr", 2, "rule"), "p", rank=rank) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("--lr", 2, "rule", "1"), "p: error: --lr 2: rule (works: 1)"),
        (ConfigError("--lr", "", "rule"), "p: error: --lr: rule"),
        (ConfigError("--a", "x\ny\udcff", "rule"), "p: error: --a x\\ny\\udcff: rule"),
        (ConfigError("--a", "9" * 999, "rule"), f"p: error: --a {'9' * 200}...: rule"),
    ],
)
def test_an_error_is_one_line(error: ConfigError, line: str) -> None:
    assert error_line(error, "p") == line


def test_several_errors_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    errors = [ConfigError("--lr", 2, "rule", "1"), ConfigError("--a", "x\ny", "rule")]
    assert refusal.refuse(CombinedError(errors), "p") == 2
    first, second, count = capsys.readouterr().err.splitlines()
    assert (first, second) == (error_line(errors[0], "p"), error_line(errors[1], "p"))
    assert count.startswith("p: 2 mistakes")
