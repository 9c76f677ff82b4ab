"""Fault injection: how faults are written, which ranks they hit, and what they do."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.comm.runtime import Launch
from cp_megatron.errors import ConfigError
from cp_megatron.faults.inject import (
    EXIT_CODE,
    KINDS,
    SLOW_SECONDS,
    Fault,
    Faults,
    InjectedError,
    parse_faults,
)
from cp_megatron.preflight.check import check
from tests.ranks import run_ranks
from tests.train.test_step import Case, shards_of, train_step_of

FAULTS = st.builds(
    Fault,
    kind=st.sampled_from(sorted(KINDS)),
    rank=st.integers(0, 3),
    step=st.integers(1, 10**6),
)


@given(st.lists(FAULTS))
def test_parse_faults_reads_what_it_documents(faults: list[Fault]) -> None:
    text = ",".join(f"{fault.kind}:{fault.rank}:{fault.step - 1}" for fault in faults)
    assert parse_faults(text, 4) == tuple(faults)
    for rank in range(4):
        mine = Faults.of(Launch(rank=rank, world_size=4, fault=text)).mine
        assert mine == tuple(fault for fault in faults if fault.rank == rank)
        assert not Faults.of(Launch(rank=rank, world_size=4, fault=text, restarts=1)).mine


@pytest.mark.parametrize(
    ("text", "rule", "works"),
    [
        ("kill", "must be kind:rank:finished_steps, or several of these", "kill:1:5"),
        ("kill:1:5,", "must be kind:rank:finished_steps, or several of these", "kill:1:5"),
        ("kill:-1:5", "must be kind:rank:finished_steps, or several of these", "kill:1:5"),
        ("nan:4:0", "there is no rank 4", "0 to 3"),
        ("boom:1:5", "there is no fault boom", ", ".join(KINDS)),
    ],
)
def test_a_mistake_is_refused_before_the_run(text: str, rule: str, works: str) -> None:
    from cp_megatron.config import Config

    with pytest.raises(ConfigError) as caught:
        check(Config(), Launch(world_size=4, under_torchrun=True, fault=text))
    error = caught.value
    assert (error.flag, error.value, error.rule, error.works) == ("CPM_FAULT", text, rule, works)


def test_it_is_read_from_the_environment_with_the_number_of_restarts() -> None:
    environ = {"CPM_FAULT": "nan:0:1", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert Launch.from_environment(environ).fault == "nan:0:1"
    launch = Launch.from_environment({**environ, "RANK": "0", "WORLD_SIZE": "1"})
    assert (launch.fault, launch.restarts) == ("nan:0:1", 2)


PROGRAM = """
from cp_megatron.faults.inject import Fault, Faults
import sys
assert "torch" not in sys.modules
faults = Faults(mine=(Fault(kind=sys.argv[1], rank=0, step=7),))
faults.before_backward(6)
print("alive", flush=True)
faults.before_backward(7)
"""


def started(kind: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "alive\n"
    return process


@pytest.mark.parametrize(("kind", "code"), [("kill", -signal.SIGKILL), ("exit", EXIT_CODE)])
def test_the_process_ends(kind: str, code: int) -> None:
    with started(kind) as process:
        assert process.wait(30) == code


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "state"), [("stop", "T"), ("hang", "S")])
def test_the_process_stays_and_does_nothing(kind: str, state: str) -> None:
    with started(kind) as process:
        end, seen = time.monotonic() + 10, ""
        while seen != state and time.monotonic() < end:
            time.sleep(0.05)
            with open(f"/proc/{process.pid}/stat") as file:
                seen = file.read().rpartition(")")[2].split()[0]
        assert process.poll() is None
        process.kill()
        assert seen == state


def test_slow_is_from_its_step_on() -> None:
    faults = Faults(mine=(Fault(kind="slow", rank=0, step=2),))
    begin = time.monotonic()
    faults.before_step(1)
    assert time.monotonic() - begin < SLOW_SECONDS / 2
    faults.before_step(2)
    faults.before_step(3)
    assert time.monotonic() - begin >= 2 * SLOW_SECONDS


def broken_steps(rank: int, world_size: int) -> tuple[float, list[float], int]:
    """A step with ``spike`` and one without; how many values ``flip`` changed."""
    case, faults = Case(), tuple(Fault(kind=kind, rank=0, step=2) for kind in ("spike", "flip"))
    train_step = train_step_of("llama", case)
    shards = shards_of(0, case, train_step)
    plain = train_step.run(shards, step=1, lr=0.0, faults=Faults(mine=faults))
    before = [parameter.detach().clone() for parameter in train_step.model.parameters()]
    spiked = train_step.run(shards, step=2, lr=0.0, faults=Faults(mine=faults))
    changed = zip(before, train_step.model.parameters(), strict=True)
    num_flipped = sum(int((old != new).sum()) for old, new in changed)
    ratios = [spiked.loss / plain.loss, spiked.grad_norm / plain.grad_norm]
    with pytest.raises(InjectedError):
        train_step.run(
            shards, step=3, lr=0.0, faults=Faults(mine=(Fault(kind="raise", rank=0, step=3),))
        )
    nan = train_step.run(
        shards, step=4, lr=0.0, faults=Faults(mine=(Fault(kind="nan", rank=0, step=4),))
    )
    return nan.loss, ratios, num_flipped


def test_the_faults_that_change_numbers() -> None:
    ((loss, ratios, num_flipped),) = run_ranks(broken_steps, 1)
    assert math.isnan(loss)
    assert ratios == pytest.approx([10, 10], rel=1e-9)
    assert num_flipped == 1


def test_a_rank_without_faults() -> None:
    faults = Faults()
    faults.before_step(1)
    faults.before_backward(1)
    assert faults.factor(1) == 1.0


def test_every_kind_is_made_by_a_test() -> None:
    files = Path(__file__).parents[1].rglob("test_*.py")
    texts = [path.read_text() for path in files if path != Path(__file__)]
    for kind in KINDS:
        made = (f'"{kind}:', f'("{kind}", ', f'[("{kind}", ')
        assert any(words in text for text in texts for words in made), kind
