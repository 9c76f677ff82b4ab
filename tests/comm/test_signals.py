"""Signals before, during and after the work of a program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cp_megatron.comm.signals import CAUGHT, stop_on_signal


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Restores the signal handlers of the test's process."""
    before = {number: signal.getsignal(number) for number in CAUGHT}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_leave_flushes_the_output_and_skips_the_interpreter_s_shutdown() -> None:
    code = """
import atexit
from cp_megatron.comm.signals import leave
atexit.register(print, "late")
print("said")
leave(3)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, b"said\n", b"")


@pytest.mark.parametrize("number", CAUGHT)
def test_before_the_training_a_signal_ends_the_process_quietly(
    number: signal.Signals,
) -> None:
    code = f"""
import os
from cp_megatron.comm.signals import stop_at_once
stop_at_once()
os.kill(os.getpid(), {int(number)})
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-number, b"", b"")


LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
RANK = """
import time
from cp_megatron.comm.runtime import Launch
from cp_megatron.comm.signals import end_with_launcher
end_with_launcher(Launch(under_torchrun=True))
print(flush=True)
time.sleep(60)
"""


def test_a_rank_ends_with_its_launcher() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, timeout=60, check=False
    )
    stat, end = Path(f"/proc/{int(ended.stdout)}/stat"), time.monotonic() + 5
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", CAUGHT)
def test_during_training_a_signal_only_requests_a_stop(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_on_signal(quiet=False) as stop:
        assert stop.signal is None
        for again in (number, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), again)
        assert stop.signal is number, "the first one"
    assert capfd.readouterr().err.strip() == f"{number.name}: finishing the step, then saving"


def test_after_the_training_signals_are_ignored() -> None:
    with stop_on_signal():
        pass
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_other_ranks_print_nothing_about_a_signal(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_on_signal(quiet=True):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr() == ("", "")


def test_a_closed_terminal_does_not_break_the_step() -> None:
    code = """
import os, signal
from cp_megatron.comm.signals import stop_on_signal
with stop_on_signal(quiet=False) as stop:
    os.close(2)
    os.kill(os.getpid(), signal.SIGINT)
os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 7
