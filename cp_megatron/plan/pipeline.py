"""Pipeline schedules as data: which forward and backward passes each stage makes, in which order.

The layers of a model are cut into runs of neighbours, the *chunks*. A stage is a rank of the
pipeline; with C chunks each, P stages have P x C chunks, dealt in turn: chunk number n of the model
belongs to stage n % P. A micro batch passes through the chunks in order, forward and then backward.

**1F1B** (Narayanan et al. 2019, arXiv:1806.03377). A stage first makes the forward passes that its
successors need before the first backward pass can come back, then alternates. P = 2, 4 micro
batches; F0 is the forward pass of micro batch 0, time runs to the right and a backward pass takes
twice as long::

    stage 0   F0 F1 .. ..  B0 B0 F2  B1 B1 F3  B2 B2  .. B3 B3
    stage 1      F0 B0 B0  F1 B1 B1  F2 B2 B2  F3 B3 B3

**Interleaved 1F1B** (Narayanan et al. 2021, arXiv:2104.04473). With C chunks, a stage makes the
passes of its first chunk for a group of P micro batches, then those of its second chunk for the
same group, and so on. Chunks are C times as short, and so are the gaps at both ends.

The share of the time in which a stage waits is (P - 1) / (M C + P - 1) with M micro batches, if all
passes take equally long and there are at least P micro batches or one chunk.

Messages never overtake one another: both ends of a channel list them in the same order. A channel
carries activations or gradients one way along the stages. NCCL may work through what a rank posts
in a group in order, sends and receives alike, so each channel is a group of its own. What stage
P - 1 sends to stage 0 has further channels: otherwise the stages would be a ring in which each may
have a send in front of the receive that the stage before it waits for. No pass waits for a send. A
loop that waited for one before it posted the next of its channel could wait for ever as well, if
C > 1 and P does not divide M.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward"]
KINDS: tuple[Kind, ...] = ("forward", "backward")


class Action(NamedTuple):
    """A pass of one micro batch through one chunk.

    Attributes:
        kind: forward or backward.
        microbatch: its number in the step.
        chunk: the number of the chunk among those of its stage.
    """

    kind: Kind
    microbatch: int
    chunk: int


class Channel(NamedTuple):
    """Messages that keep their order.

    Attributes:
        kind: ``forward`` carries activations, ``backward`` their gradients.
        wraps: they go from the last stage to the first, or back.
    """

    kind: Kind
    wraps: bool


class PipelineMessage(NamedTuple):
    """What one stage sends to another after a pass, for a pass.

    Attributes:
        channel: of the message.
        peer: the other stage.
    """

    channel: Channel
    peer: int


@dataclass(frozen=True)
class PipelinePlan:
    """The passes of all stages in one step.

    Attributes:
        num_stages: stages of the pipeline, P.
        num_microbatches: micro batches of a step, M.
        num_chunks: chunks of each stage, C.
        has_backward: False plans forward passes alone, as for an evaluation.
    """

    num_stages: int
    num_microbatches: int
    num_chunks: int = 1
    has_backward: bool = True

    def actions(self, stage: int) -> tuple[Action, ...]:
        """The passes of a stage, in order."""
        return tuple(self._order(stage))

    def _order(self, stage: int) -> Iterator[Action]:
        """Forward passes, then one of each kind in turn, then the backward passes that are left."""
        forward = [Action("forward", m, c) for m, c in self._in_groups()]
        if not self.has_backward:
            return iter(forward)
        last = self.num_chunks - 1
        backward = [Action("backward", m, last - c) for m, c in self._in_groups()]
        num_first = min(self._warmup(stage), len(forward))
        pairs = zip_longest(forward[num_first:], backward)
        in_turn = (action for action in chain.from_iterable(pairs) if action is not None)
        return chain(forward[:num_first], in_turn)

    def _in_groups(self) -> Iterator[tuple[int, int]]:
        """Micro batch and chunk of all passes of a kind: group by group, chunk by chunk."""
        start = 0
        for size in self._group_sizes:
            for chunk in range(self.num_chunks):
                for microbatch in range(start, start + size):
                    yield microbatch, chunk
            start += size

    @property
    def _group_sizes(self) -> list[int]:
        """P micro batches each; the first group takes those that are left over.

        In a smaller group, the passes of a second chunk would come before those that they need.
        """
        whole, rest = divmod(self.num_microbatches, self.num_stages)
        if not whole:
            return [rest]
        return [self.num_stages + rest] + [self.num_stages] * (whole - 1)

    def _warmup(self, stage: int) -> int:
        """Forward passes of a stage before its first backward pass, but the one just before it."""
        behind = self.num_stages - 1 - stage
        if self.num_chunks == 1:
            return behind
        # Two for each stage behind: its forward pass and its backward pass come before.
        return 2 * behind + (self.num_chunks - 1) * self._group_sizes[0]

    def chunk_of_model(self, stage: int, chunk: int) -> int:
        """The number of a stage's chunk among all chunks of the model."""
        return chunk * self.num_stages + stage

    def received(self, stage: int, action: Action) -> PipelineMessage | None:
        """The message that a pass needs; None if it begins with tokens, or with the loss."""
        number = self.chunk_of_model(stage, action.chunk)
        if action.kind == "forward":
            return self._message(stage, action.kind, -1) if number > 0 else None
        is_last = number == self.num_stages * self.num_chunks - 1
        return None if is_last else self._message(stage, action.kind, 1)

    def sent(self, stage: int, action: Action) -> PipelineMessage | None:
        """The message that follows a pass."""
        number = self.chunk_of_model(stage, action.chunk)
        if action.kind == "backward":
            return self._message(stage, action.kind, -1) if number > 0 else None
        is_last = number == self.num_stages * self.num_chunks - 1
        return None if is_last else self._message(stage, action.kind, 1)

    def _message(self, stage: int, kind: Kind, step: int) -> PipelineMessage | None:
        """To or from the stage before (-1) or behind (1)."""
        if self.num_stages == 1:
            return None
        peer = (stage + step) % self.num_stages
        return PipelineMessage(Channel(kind, wraps=peer != stage + step), peer)

    def in_flight(self, stage: int) -> int:
        """The most passes through a chunk whose backward pass is still to come: what a stage keeps
        activations of. Without backward passes, it keeps none."""
        if not self.has_backward:
            return 0
        held = most = 0
        for action in self.actions(stage):
            held += 1 if action.kind == "forward" else -1
            most = max(most, held)
        return most

    @property
    def bubble(self) -> float:
        """The share of the time in which a stage waits, if all passes take equally long.

        With several chunks and P > M, a stage also waits between its chunks.
        """
        least, most = sorted((self.num_stages, self.num_microbatches))
        passes = self.num_microbatches * self.num_chunks
        if self.num_chunks == 1:
            return (self.num_stages - 1) / (passes + self.num_stages - 1)
        return 1 - passes / (most * self.num_chunks + least - 1)
