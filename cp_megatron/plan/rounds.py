"""The parts of a schedule: rounds, and the messages between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cp_megatron.plan.tiling import Span, Tile, num_positions


@dataclass(frozen=True)
class Message:
    """Keys of rank ``owner``, or their gradients, that this rank exchanges with ``peer``.

    ``spans`` gives their place in this rank's buffer: the shard, or the arrival of a round.
    """

    peer: int
    owner: int
    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        """The number of key positions in the message."""
        return num_positions(self.spans)


@dataclass(frozen=True, kw_only=True)
class Round:
    """The tiles and messages of one rank in one round. Empty messages are None and never sent.

    Attributes:
        owner: the rank whose keys are computed; -1 if the keys come from all ranks together.
        keys: positions of the arrival, as runs, in local order.
        tiles: the tiles to compute; columns count in the arrival.
        send_keys: keys for the receiver's next round; spans in this rank's shard (round 0 or
            ``direct``) or in this round's arrival.
        receive_keys: fills the next round's arrival.
        pass_grads: partial key gradients for rank - 1 after this round; spans in this arrival.
        return_grads: finished key gradients for the owner after this round; spans likewise.
        receive_passed: the gradients that rank + 1 passes; spans in the next round's arrival.
        receive_returned: finished gradients of this rank's keys; spans in its shard.
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
        """The number of keys in the arrival."""
        return num_positions(self.keys)

    @property
    def messages(self) -> dict[str, Message]:
        """The messages by the names of their attributes."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Message)}

    @property
    def receives(self) -> bool:
        """Whether anything arrives in or after this round."""
        return any(name.startswith("receive_") for name in self.messages)

    def with_peers(self, renumber: Callable[[int], int]) -> Round:
        """Returns the round with other numbers for the peers of its messages."""
        messages: dict[str, Any] = {
            name: replace(value, peer=renumber(value.peer)) for name, value in self.messages.items()
        }
        return replace(self, **messages)
