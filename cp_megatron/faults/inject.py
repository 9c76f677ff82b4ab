"""Faults on purpose: what a rank does wrong in a step, to see what the run makes of it.

``CPM_FAULT=kill:1:5`` ends rank 1 in the step that begins with 5 steps finished (the one that would
have been logged as step 6). Several are separated by commas. A rank that was started again by its
launcher has none, so that a run which goes on is not hit twice. No torch.
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
        "stop": "the process is stopped (SIGSTOP) there",
        "exit": f"the process leaves there with code {EXIT_CODE}",
        "hang": "the process sleeps there for ever",
        "raise": "backward raises an exception",
        "nan": "this rank's losses, and with them its gradients, are not finite",
        "spike": f"this rank's losses, and with them its gradients, are {SPIKE:g} times as large",
        "flip": "one bit of one parameter that this rank holds flips after the update",
        "slow": f"the rank is {SLOW_SECONDS:g} s late to this step and to every later one",
    }
)
"""Kind -> what happens."""

_FAULT = re.compile(r"([a-z]+):([0-9]{1,9}):([0-9]{1,9})")


class InjectedError(RuntimeError):
    """What the fault ``raise`` raises."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: one of ``KINDS``.
        rank: the rank that does it, counted over all nodes.
        step: steps finished before the one it happens in.
    """

    kind: str
    rank: int
    step: int


def parse_faults(text: str, world_size: int | None = None) -> tuple[Fault, ...]:
    """The faults that ``CPM_FAULT`` asks for; none where it is empty.

    Args:
        text: ``kind:rank:step``, several separated by commas.
        world_size: ranks in all; None where that is not known.

    Raises:
        ConfigError: it is not written so, or there is no such kind or rank.
    """
    return tuple(_parse(part.strip(), text, world_size) for part in text.split(",") if text)


def _parse(part: str, text: str, world_size: int | None) -> Fault:
    found = _FAULT.fullmatch(part)
    if found is None:
        raise ConfigError(VARIABLE, text, "must be kind:rank:step, or several of these", "kill:1:5")
    kind, rank, step = found[1], int(found[2]), int(found[3])
    if kind not in KINDS:
        raise ConfigError(VARIABLE, text, f"there is no fault {kind}", ", ".join(KINDS))
    if world_size is not None and rank >= world_size:
        works = "0" if world_size == 1 else f"0 to {world_size - 1}"
        raise ConfigError(VARIABLE, text, f"there is no rank {rank}", works)
    return Fault(kind=kind, rank=rank, step=step)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong on this rank, asked at the places where it can; by default nothing does.

    Attributes:
        mine: this rank's faults.
    """

    mine: tuple[Fault, ...] = ()

    @classmethod
    def of(cls, launch: Launch) -> Faults:
        """This process's own.

        Raises:
            ConfigError: ``CPM_FAULT`` is malformed.
        """
        found = parse_faults(launch.fault, launch.world_size)
        if launch.restarts:
            return cls()
        return cls(mine=tuple(fault for fault in found if fault.rank == launch.rank))

    def has(self, kind: str, step: int) -> bool:
        """Whether ``kind`` happens in the step that begins with ``step`` finished."""
        return any(fault.kind == kind and fault.step == step for fault in self.mine)

    def before_step(self, step: int) -> None:
        """At the beginning, before any message of the step."""
        if any(fault.kind == "slow" and step >= fault.step for fault in self.mine):
            time.sleep(SLOW_SECONDS)

    def before_backward(self, step: int) -> None:
        """Where forward is done; may not return."""
        if self.has("kill", step):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.has("stop", step):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.has("exit", step):
            os._exit(EXIT_CODE)
        while self.has("hang", step):
            time.sleep(3600)

    def factor(self, step: int) -> float:
        """What this rank's losses are multiplied with."""
        if self.has("nan", step):
            return float("nan")
        return SPIKE if self.has("spike", step) else 1.0

    @staticmethod
    def raises(gradient: object) -> NoReturn:
        """A hook on a gradient."""
        raise InjectedError(f"{VARIABLE}: backward raises")
