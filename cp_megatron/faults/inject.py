"""Fault injection: errors that a rank makes on purpose, to test how the run handles them.

``CPM_FAULT=kill:1:5`` kills rank 1 in the step after step 5, that is in step 6. Several faults are
separated by commas. A rank that its launcher restarted has no faults, so that a run is not hit
again when it continues.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from cp_megatron.comm.runtime import Launch
from cp_megatron.errors import ConfigError

VARIABLE = "CPM_FAULT"
SLOW_SECONDS = 0.2
SPIKE = 10.0
EXIT_CODE = 3

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "kill": "the process is killed (SIGKILL) between forward and backward",
        "stop": "the process is stopped (SIGSTOP) between forward and backward",
        "exit": f"the process exits with code {EXIT_CODE} between forward and backward",
        "hang": "the process sleeps forever between forward and backward",
        "raise": "backward raises an exception",
        "nan": "the losses of this rank, and so its gradients, are not finite",
        "spike": f"the losses of this rank, and so its gradients, are {SPIKE:g} times as large",
        "flip": "one bit of one parameter that this rank holds flips after the update",
        "slow": f"the rank is {SLOW_SECONDS:g} s late to this step and to every later one",
    }
)
"""The effect of each kind of fault."""


class InjectedError(RuntimeError):
    """The exception of the fault ``raise``."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault."""

    kind: str  # one of ``KINDS``
    rank: int  # the rank it happens on, counted over all nodes
    step: int  # the number of the step it happens in, from 1


def parse_faults(text: str, world_size: int) -> tuple[Fault, ...]:
    """The faults in the text of ``CPM_FAULT``; none if it is empty.

    Args:
        text: ``kind:rank:finished_steps``, several separated by commas; the fault happens in the
            step after that many steps.
        world_size: number of ranks.

    Raises:
        ConfigError: the text has another form, or there is no such kind or rank.
    """
    faults = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"([a-z]+):([0-9]{1,9}):([0-9]{1,9})", part.strip())
        if match is None:
            rule = "must be kind:rank:finished_steps, or several of these"
            raise ConfigError(VARIABLE, text, rule, "kill:1:5")
        kind, rank, steps = match[1], int(match[2]), int(match[3])
        if kind not in KINDS:
            raise ConfigError(VARIABLE, text, f"there is no fault {kind}", ", ".join(KINDS))
        if rank >= world_size:
            works = "0" if world_size == 1 else f"0 to {world_size - 1}"
            raise ConfigError(VARIABLE, text, f"there is no rank {rank}", works)
        faults.append(Fault(kind=kind, rank=rank, step=steps + 1))
    return tuple(faults)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """The faults of this rank, by default none."""

    mine: tuple[Fault, ...] = ()

    @classmethod
    def of(cls, launch: Launch) -> Faults:
        """The faults of this process.

        Raises:
            ConfigError: ``CPM_FAULT`` is malformed.
        """
        faults = parse_faults(launch.fault, launch.world_size)
        mine = (fault for fault in faults if fault.rank == launch.rank and not launch.restarts)
        return cls(mine=tuple(mine))

    def has(self, kind: str, step: int) -> bool:
        """Whether ``kind`` happens in this step."""
        return any(fault.kind == kind and fault.step == step for fault in self.mine)

    def before_step(self, step: int) -> None:
        """Applies the faults at the beginning of a step, before its first message."""
        if any(fault.kind == "slow" and step >= fault.step for fault in self.mine):
            time.sleep(SLOW_SECONDS)

    def before_backward(self, step: int) -> None:
        """Applies the faults between forward and backward; may not return."""
        for kind, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
            if self.has(kind, step):
                os.kill(os.getpid(), number)
        if self.has("exit", step):
            os._exit(EXIT_CODE)
        while self.has("hang", step):
            time.sleep(3600)

    def factor(self, step: int) -> float:
        """The factor of this rank's losses."""
        if self.has("nan", step):
            return float("nan")
        return SPIKE if self.has("spike", step) else 1.0

    @staticmethod
    def raises(gradient: object) -> NoReturn:
        """A hook for a gradient that raises an exception."""
        raise InjectedError(f"{VARIABLE}: backward raises")
