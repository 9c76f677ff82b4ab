"""Simulates a pipeline plan: when each pass runs, and whether the messages let it.

Every stage runs its passes in order, as ``pipeline/run_stage.py`` does. Its host posts the send of
a pass once it has run. It posts the receive for the next pass before that pass runs if the two have
different kinds, otherwise behind the send. A pass waits for its receive.

The messages of a stage in one group are one stream, in which sends and receives lie in the order in
which they were posted, as in NCCL. A message passes when its send is first in one stage's stream
and its receive first in the other's. So two stages that share a group for both directions may each
have a send in front and wait for ever::

    stage 0   receive B0, send F1        stage 1   receive F1, send B0
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from cp_megatron.plan.pipeline import Action, Channel, PipelinePlan

Durations = float | Sequence[float]
"""How long passes of a kind take: one number for all chunks, or one for each chunk of the model."""


class TimedPass(NamedTuple):
    """A pass, and when it starts and ends."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class PipelineTimeline:
    """When each stage of a plan makes its passes.

    Attributes:
        plan: the plan.
        passes: of each stage, in order.
    """

    plan: PipelinePlan
    passes: tuple[tuple[TimedPass, ...], ...]

    @cached_property
    def duration(self) -> float:
        """The time that a step takes, from its first pass to the end of its last one."""
        return max((timed.end for stage in self.passes for timed in stage), default=0.0)

    def idle(self, stage: int) -> float:
        """The share of the time in which a stage waits."""
        busy = sum(timed.end - timed.start for timed in self.passes[stage])
        return 1.0 - busy / self.duration if self.duration else 0.0

    @property
    def bubble(self) -> float:
        """The share of the time in which stages wait, the mean of all."""
        stages = range(len(self.passes))
        return sum(map(self.idle, stages)) / len(stages)

    @classmethod
    def simulate(
        cls,
        plan: PipelinePlan,
        *,
        forward: Durations = 1.0,
        backward: Durations = 2.0,
        group_of: Callable[[Channel], Hashable] | None = None,
        open_sends: int | None = None,
    ) -> PipelineTimeline:
        """Runs a plan with messages that take no time.

        Args:
            plan: the passes and messages.
            forward, backward: how long passes take.
            group_of: the process group that carries a channel; None: each channel has its own.
            open_sends: sends of a channel that a stage leaves open; before it posts another one, it
                waits for the oldest. None: any number.

        Raises:
            AssertionError: stages wait for each other, or a receive meets another message than the
                one it is for, which is a bug in the plan or in the choice of groups.
        """
        simulation = _Simulation(plan, forward, backward, group_of or (lambda channel: channel))
        return cls(plan, simulation.run(open_sends))


@dataclass(eq=False, slots=True)
class _Operation:
    """A send or a receive.

    Attributes:
        stage, peer: the stage that posted it, and the other one.
        sends: whether it is a send.
        content: the kind, micro batch and chunk of the model of the pass that needs the message.
        posted: when it was posted.
        done: when the message passed; None: it has not.
    """

    stage: int
    peer: int
    sends: bool
    content: tuple[str, int, int]
    posted: float
    done: float | None = None

    def __str__(self) -> str:
        kind, microbatch, chunk = self.content
        verb, to = ("send", "to") if self.sends else ("receive", "from")
        what = f"{kind} of micro batch {microbatch} in chunk {chunk}"
        return f"the {verb} {to} stage {self.peer} for the {what}"


class _Simulation:
    """The hosts of all stages, and their streams in every group."""

    def __init__(
        self,
        plan: PipelinePlan,
        forward: Durations,
        backward: Durations,
        group_of: Callable[[Channel], Hashable],
    ) -> None:
        self.plan = plan
        self.group_of = group_of
        self.durations = {"forward": forward, "backward": backward}
        self.passes: list[list[TimedPass]] = [[] for _ in range(plan.num_stages)]
        self.streams: defaultdict[tuple[Hashable, int], deque[_Operation]] = defaultdict(deque)
        self.awaited: dict[int, _Operation] = {}
        self.ready = deque(range(plan.num_stages))

    def run(self, open_sends: int | None) -> tuple[tuple[TimedPass, ...], ...]:
        """Lets each host run until it waits, as long as any can."""
        hosts = [self._host(stage, open_sends) for stage in range(self.plan.num_stages)]
        while self.ready:
            stage = self.ready.popleft()
            self.awaited.pop(stage, None)
            for operation in hosts[stage]:
                if operation.done is None:
                    self.awaited[stage] = operation
                    break
        assert not any(self.streams.values()), self._report()
        return tuple(map(tuple, self.passes))

    def _host(self, stage: int, open_sends: int | None) -> Iterator[_Operation]:
        """Makes the passes of a stage; yields each operation before what waits for it."""
        plan, now, actions = self.plan, 0.0, self.plan.actions(stage)
        following = self._receive(stage, actions[0], now) if actions else None
        sends: defaultdict[Channel, deque[_Operation]] = defaultdict(deque)
        for action, after in pairwise((*actions, None)):
            assert action is not None
            receive, following = following, None
            is_early = after is not None and after.kind != action.kind
            if is_early:
                following = self._receive(stage, after, now)
            if receive is not None:
                yield receive
                now = max(now, _time(receive))
            chunk, start = plan.chunk_of_model(stage, action.chunk), now
            given = self.durations[action.kind]
            now += given if isinstance(given, int | float) else given[chunk]
            self.passes[stage].append(TimedPass(action, start, now))
            if (message := plan.sent(stage, action)) is not None:
                opened = sends[message.channel]
                if open_sends is not None and len(opened) == open_sends:
                    yield opened[0]
                    now = max(now, _time(opened.popleft()))
                reader = chunk + (1 if action.kind == "forward" else -1)
                content = action.kind, action.microbatch, reader
                opened.append(_Operation(stage, message.peer, True, content, now))
                self._post(opened[-1], message.channel)
            if not is_early:
                following = self._receive(stage, after, now)

    def _receive(self, stage: int, action: Action | None, now: float) -> _Operation | None:
        message = None if action is None else self.plan.received(stage, action)
        if action is None or message is None:
            return None
        content = (
            *(action.kind, action.microbatch),
            self.plan.chunk_of_model(stage, action.chunk),
        )
        operation = _Operation(stage, message.peer, False, content, now)
        self._post(operation, message.channel)
        return operation

    def _post(self, operation: _Operation, channel: Channel) -> None:
        """Adds an operation to its stream, and lets messages pass that can."""
        group = self.group_of(channel)
        self.streams[group, operation.stage].append(operation)
        self._advance(group, operation.stage)

    def _advance(self, group: Hashable, stage: int) -> None:
        """Lets messages pass whose ends are both first, from a stage's stream on."""
        mine = self.streams[group, stage]
        while mine:
            peer = mine[0].peer
            other = self.streams[group, peer]
            if not other or other[0].peer != stage or mine[0].sends == other[0].sends:
                return
            one, two = mine.popleft(), other.popleft()
            assert one.content == two.content, (
                f"both ends have messages in another order: {one}, at stage {stage}, "
                f"meets {two}, at stage {peer}"
            )
            for end in (one, two):
                end.done = max(one.posted, two.posted)
                if self.awaited.get(end.stage) is end:
                    self.ready.append(end.stage)
            self._advance(group, peer)

    def _report(self) -> str:
        """Which stages wait for what, or which messages nobody waits for."""
        lines = []
        for stream in filter(None, self.streams.values()):
            first = stream[0]
            awaited = self.awaited.get(first.stage)
            if not self.awaited:
                lines.append(f"stage {first.stage} ends with {first} still open")
            elif awaited in stream:
                behind = f", which is behind {first}" if awaited is not first else ""
                lines.append(f"stage {first.stage} waits for {awaited}{behind}")
        return "messages do not pass: " + "; ".join(sorted(lines))


def _time(operation: _Operation) -> float:
    assert operation.done is not None
    return operation.done
