"""A schedule: the rounds of all ranks under one exchange, and what they cost.

    exchange     sequence travels       heads travel            explained in
    p2p          in rounds              -                       ring.py
    all_gather   at once                -                       gather.py
    a2a          -                      among all ranks         heads.py
    a2a+p2p      in rounds              among neighbours        heads.py, ring.py

Whatever the exchange, a rank's work is a sequence of rounds, and a round a list of tiles. Where
heads travel first, the rounds are those of a whole group of neighbours: rows count in what the
group holds together (``schedule.rows``), and every member computes them for its own heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from cp_megatron.errors import ConfigError
from cp_megatron.plan.exchange import Heads, check_exchange, choose_exchange, choose_route
from cp_megatron.plan.gather import Gather, gathered_width, plan_gather, plan_gather_rounds
from cp_megatron.plan.heads import HeadExchange, check_heads, merged_layout, plan_heads
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.readers import Readers
from cp_megatron.plan.ring import plan_ring
from cp_megatron.plan.rounds import Message, Round
from cp_megatron.plan.show.plot import write_svg


@dataclass(frozen=True)
class Schedule:
    """The schedule of a mask on a layout. Each rank's part is computed when asked for.

    Attributes:
        mask, layout: what attends to what, and who holds it.
        exchange: ``p2p``, ``all_gather``, ``a2a`` or ``a2a+p2p``; never ``auto``.
        route: ``ring`` or ``direct``, for the p2p part.
        num_heads, num_kv_heads: of the model; known wherever heads travel.
        hierarchical_sizes: ranks that trade heads, and groups of them; their product is all ranks.
        reason: why this exchange.
    """

    mask: Mask
    layout: SequenceLayout
    exchange: str
    route: str
    num_heads: int | None = None
    num_kv_heads: int | None = None
    hierarchical_sizes: tuple[int, int] = (1, 1)
    reason: str = "asked for"

    @classmethod
    def build(
        cls,
        mask: Mask,
        layout: SequenceLayout,
        exchange: str = "p2p",
        route: str = "ring",
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        hierarchical_sizes: tuple[int, int] | None = None,
        *,
        head_dim: int = 1,
        v_head_dim: int | None = None,
    ) -> Schedule:
        """Plans the exchange.

        Args:
            mask: what attends to what.
            layout: who holds what, of the same length.
            exchange: one of the four above, or ``auto`` for the one that moves least.
            route: ``ring``, ``direct``, or ``auto`` for the one that moves less.
            num_heads: query heads, needed for a2a, a2a+p2p and ``auto``.
            num_kv_heads: key/value heads; as many as query heads by default.
            hierarchical_sizes: (A, P) of a2a+p2p.
            head_dim, v_head_dim: widths, which ``auto`` weighs queries and keys with.

        Raises:
            ConfigError: a name is unknown, layout and mask differ in length, the heads can not be
                shared as asked, or the sizes do not multiply to the number of ranks.
        """
        size = layout.cp_size
        check_exchange(exchange, route, size, hierarchical_sizes)
        held = layout.shard_len * size
        if held != mask.seq_len:
            raise ConfigError("layout", held, f"must hold the mask's {mask.seq_len} positions")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if exchange == "auto" or exchange.startswith("a2a"):
            check_heads(1, num_heads, kv_heads, exchange)
        plan = cls(mask, layout, exchange, route, num_heads, kv_heads)
        if exchange == "auto":
            assert num_heads is not None
            assert kv_heads is not None
            width = head_dim if v_head_dim is None else v_head_dim
            heads = Heads(
                num_heads=num_heads, num_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=width
            )
            choice = choose_exchange(mask, layout, plan.readers, heads, hierarchical_sizes, route)
            plan = replace(
                plan,
                exchange=choice.exchange,
                route=choice.route,
                hierarchical_sizes=choice.sizes,
                reason=choice.reason,
            )
        else:
            sizes = {"p2p": (1, size), "all_gather": (1, size), "a2a": (size, 1)}
            plan = replace(plan, hierarchical_sizes=hierarchical_sizes or sizes[exchange])
        if plan.all_to_all_size > 1:
            check_heads(plan.all_to_all_size, num_heads, kv_heads, plan.exchange)
        if plan.route == "auto":
            plan = replace(plan, route=choose_route(plan.readers))
        return plan

    @property
    def all_to_all_size(self) -> int:
        """Ranks that trade heads with each other; 1 where heads do not travel."""
        return self.hierarchical_sizes[0]

    @cached_property
    def rows(self) -> SequenceLayout:
        """What each group of all_to_all_size ranks holds together; the layout itself without head_exchange."""
        return (
            merged_layout(self.layout, self.all_to_all_size)
            if self.all_to_all_size > 1
            else self.layout
        )

    @cached_property
    def readers(self) -> Readers:
        """Who reads which keys, by group of all_to_all_size ranks."""
        return Readers.of(self.mask, self.rows)

    def rounds(self, rank: int) -> tuple[Round, ...]:
        """What ``rank`` does, in order; message peers are ranks.

        Round 0 is the own keys. Under p2p, round t is the keys of the rank (group of all_to_all_size
        ranks) t places up; under all_gather, round 1 is everything else.
        """
        if self.exchange == "all_gather":
            return plan_gather_rounds(self.mask, self.rows, self.readers, rank)
        size = self.all_to_all_size
        rounds = plan_ring(self.mask, self.rows, self.readers, rank // size, self.route)
        if size == 1:
            return rounds
        return tuple(_with_peers(round_, size, rank % size) for round_ in rounds)

    def gather(self, rank: int) -> Gather | None:
        """The collective of all_gather."""
        if self.exchange != "all_gather":
            return None
        return plan_gather(self.readers, rank)

    def heads(self, rank: int) -> HeadExchange | None:
        """The trade of heads."""
        if self.all_to_all_size == 1:
            return None
        assert self.num_heads is not None
        assert self.num_kv_heads is not None
        return plan_heads(
            self.layout, rank, self.all_to_all_size, self.num_heads, self.num_kv_heads
        )

    def pairs(self, rank: int) -> int:
        """Attended (query, key) pairs that ``rank`` computes, each for the heads it computes.

        Where heads travel, members of a group compute the same pairs for different heads.
        """
        return sum(tile.pairs for round_ in self.rounds(rank) for tile in round_.tiles)

    def kv_tokens_received(self, rank: int) -> int:
        """Key positions ``rank`` receives in forward, those it only passes on included.

        all_gather counts the parts of all other ranks, padding included; where heads travel, the
        group's other shards and then what rounds bring, each for the heads ``rank`` computes.
        """
        size = self.layout.cp_size
        if self.exchange == "all_gather":
            return (size - 1) * gathered_width(self.readers)
        traded = (self.all_to_all_size - 1) * self.layout.shard_len
        return traded + self._tokens_of_rounds(rank)

    def _tokens_of_rounds(self, rank: int) -> int:
        return int(self.readers.received[self.route][rank // self.all_to_all_size])

    def bytes_received(
        self, rank: int, head_dim: int, element_size: int, v_head_dim: int | None = None
    ) -> int:
        """Bytes ``rank`` receives in forward for one batch row.

        Keys and values of a position travel together, ``head_dim + v_head_dim`` elements for each
        of the key/value heads the schedule was built with, or for one head without. Where heads
        travel, queries and results count too.
        """
        v_dim = head_dim if v_head_dim is None else v_head_dim
        head_exchange = self.heads(rank)
        if head_exchange is None:
            heads = self.num_kv_heads or 1
            return self.kv_tokens_received(rank) * heads * (head_dim + v_dim) * element_size
        q0, q1 = head_exchange.query_heads[head_exchange.index]
        k0, k1 = head_exchange.kv_heads[head_exchange.index]
        keys = (k1 - k0) * (head_dim + v_dim)
        traded = (len(head_exchange.peers) - 1) * self.layout.shard_len
        elements = traded * ((q1 - q0) * (head_dim + v_dim) + keys)
        return (elements + self._tokens_of_rounds(rank) * keys) * element_size

    def plot(self, path: str) -> None:
        """Draws who computes which tile in which round as an SVG file."""
        write_svg(self, path)


def _with_peers(round_: Round, size: int, index: int) -> Round:
    """A round of groups as one of their members': it talks to the member in its own place."""

    def moved(message: Message | None) -> Message | None:
        if message is None:
            return None
        return replace(message, peer=message.peer * size + index)

    return replace(
        round_,
        send_keys=moved(round_.send_keys),
        receive_keys=moved(round_.receive_keys),
        pass_grads=moved(round_.pass_grads),
        return_grads=moved(round_.return_grads),
        receive_passed=moved(round_.receive_passed),
        receive_returned=moved(round_.receive_returned),
    )
