"""What a schedule is made of: rounds, and the messages between them. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from cp_megatron.plan.tiling import Span, Tile, num_positions


@dataclass(frozen=True)
class Message:
    """Keys of rank ``owner``, or their gradients, between this rank and ``peer``.

    ``spans`` says where they lie in this rank's buffer: the shard, or the arrival of a round.
    """

    peer: int
    owner: int
    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        """Key positions in the message."""
        return num_positions(self.spans)


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one rank does in one round. A message that would be empty is None and never sent.

    Attributes:
        owner: whose keys are computed; -1 where they come from all ranks together.
        keys: positions of the arrival, as runs, in local order.
        tiles: what is computed; columns count in the arrival.
        send_keys: for the receiver's next round; spans in the own shard (round 0 or ``direct``)
            or in this round's arrival.
        receive_keys: fills the next round's arrival.
        pass_grads: partial key gradients after this round, for rank - 1; spans in this arrival.
        return_grads: finished key gradients after this round, for the owner; spans likewise.
        receive_passed: what rank + 1 passes; spans in the next round's arrival.
        receive_returned: what comes home; spans in the own shard.
    """

    owner: int
    keys: tuple[Span, ...]
    tiles: tuple[Tile, ...]
    send_keys: Message | None = None
    receive_keys: Message | None = None
    pass_grads: Message | None = None
    return_grads: Message | None = None
    receive_passed: Message | None = None
    receive_returned: Message | None = None

    @property
    def num_keys(self) -> int:
        """Length of the arrival."""
        return num_positions(self.keys)
