"""Makes the passes of one stage in the order of its plan.

While a pass is computed, the message for the next one is on its way if it has another kind::

    receive gradient of B0  |  receive input of F2  |
    compute F1              |  compute B0           |  compute F2
                            |  send result of F1    |  send result of B0

Among passes of one kind, a message is received after the result before it was sent. So each stage
sends and receives on a channel in the order of its passes, which is the same on all stages: a
backend may work through the messages of a channel one by one, and none waits for ever.

With one stage, the same loop makes a forward and a backward pass of each micro batch in turn.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import Tensor

from cp_megatron.comm.send_receive import Pending
from cp_megatron.comm.trace import waiting_for
from cp_megatron.pipeline.stage_links import Arriving, StageLinks
from cp_megatron.plan.pipeline import Action, PipelinePlan


class Outputs(NamedTuple):
    """Results of a forward pass.

    Attributes:
        stream: what the next chunk reads; None from the last chunk.
        objective: [], this chunk's summand of what is trained; None if it has none.
    """

    stream: Tensor | None
    objective: Tensor | None


class Passes(Protocol):
    """What a stage computes."""

    def forward(self, action: Action, x: Tensor | None) -> Outputs:
        """A forward pass; ``x`` is what the chunk before returned, None in the first chunk."""

    def backward(self, action: Action, outputs: Outputs, gradient: Tensor | None) -> None:
        """The backward pass; ``gradient`` is that of ``outputs.stream``."""

    def empty_stream(self, microbatch: int) -> Tensor:
        """Memory for a micro batch between two chunks."""


def run_stage(plan: PipelinePlan, stage: int, links: StageLinks, passes: Passes) -> None:
    """Makes all passes of a stage, and returns when everything it sends is sent.

    Shapes may differ between micro batches: each stage knows them without a message.
    """
    assert plan.num_stages > 1 or plan.num_chunks == 1, "one stage sends itself nothing"
    run, actions = _StageRun(plan, stage, links, passes), plan.actions(stage)
    arriving = run.receive(actions[0] if actions else None)
    for action, following in pairwise((*actions, None)):
        assert action is not None
        current, is_early = arriving, following is not None and following.kind != action.kind
        arriving = run.receive(following) if is_early else None
        with waiting_for("another stage"):
            x = None if current is None else current.wait()
        try:
            run.make(action, x)
        except Exception as error:
            if plan.num_stages > 1:
                error.add_note(f"stage {stage}, {action.kind} of micro batch {action.microbatch},")
            raise
        if not is_early:
            arriving = run.receive(following)
    links.settle()


class _StageRun:
    """The passes of a stage, and what waits for their backward passes."""

    def __init__(self, plan: PipelinePlan, stage: int, links: StageLinks, passes: Passes) -> None:
        self._plan, self._stage, self._links, self._passes = plan, stage, links, passes
        self._kept: dict[tuple[int, int], tuple[Tensor | None, Outputs]] = {}
        self._forwarded: dict[tuple[int, int], Pending] = {}

    def receive(self, action: Action | None) -> Arriving | None:
        """Starts to receive what a pass needs."""
        message = None if action is None else self._plan.received(self._stage, action)
        if action is None or message is None:
            return None
        return self._links.receive(message, self._passes.empty_stream(action.microbatch))

    def make(self, action: Action, x: Tensor | None) -> None:
        """Makes a pass and starts to send its result. ``x`` is what it received."""
        place = action.microbatch, action.chunk
        if action.kind == "forward":
            if x is not None and self._plan.has_backward:
                x.requires_grad_()
            outputs = self._passes.forward(action, x)
            result = outputs.stream
            if self._plan.has_backward:
                self._kept[place] = x, outputs
        else:
            entered, outputs = self._kept.pop(place)
            self._links.release(self._forwarded.pop(place, None))  # its gradient is here
            self._passes.backward(action, outputs, x)
            result = None if entered is None else entered.grad
        if (message := self._plan.sent(self._stage, action)) is not None:
            assert result is not None
            sent = self._links.send(message, result.detach())
            if action.kind == "forward" and self._plan.has_backward:
                self._forwarded[place] = sent
