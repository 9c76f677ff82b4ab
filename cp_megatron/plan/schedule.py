"""A schedule: the rounds of all ranks under one exchange, and what they cost.

    exchange     sequence is sent       heads are exchanged     explained in
    p2p          in rounds              -                       ring.py
    all_gather   at once                -                       gather.py
    a2a          -                      among all ranks         heads.py
    a2a+p2p      in rounds              among neighbours        heads.py, ring.py

Under every exchange, a rank's work is a sequence of rounds, and a round is a list of tiles. If
ranks first exchange heads for tokens by all-to-all, the rounds are those of a whole group of
neighbours: rows count in the tokens that the group holds together (``schedule.group_layout``), and
every member computes them for its own heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from cp_megatron.errors import ConfigError
from cp_megatron.plan.exchange import (
    Heads,
    check_exchange,
    check_latent,
    check_latent_exchange,
    check_parts,
    choose_exchange,
    choose_parts,
    choose_route,
    kv_heads_of_ranks,
)
from cp_megatron.plan.gather import Gather, gathered_width, plan_gather, plan_gather_rounds
from cp_megatron.plan.heads import (
    HeadExchange,
    check_heads,
    even_runs,
    merged_layout,
    plan_heads,
)
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.rates import USUAL_RATES, Rates
from cp_megatron.plan.readers import Readers
from cp_megatron.plan.ring import plan_ring
from cp_megatron.plan.rounds import Round
from cp_megatron.plan.show.plot import write_svg
from cp_megatron.plan.tiling import Span, num_positions


@dataclass(frozen=True)
class Schedule:
    """The schedule of a mask on a layout. Each rank's part is computed on request.

    Attributes:
        mask, layout: which keys each query attends, and which rank holds which tokens.
        exchange: ``p2p``, ``all_gather``, ``a2a`` or ``a2a+p2p``; never ``auto``.
        route: ``ring`` or ``direct``, for the p2p part.
        num_heads, num_kv_heads: of the model; always known if heads are exchanged.
        hierarchical_sizes: the size of a group of ranks that exchange heads, and the number of such
            groups; their product is the number of ranks.
        reason: why this exchange was chosen.
        latent: (L, R) if p2p or all_gather send latents of width L and rotary keys of width R, and
            their readers expand them; None if keys and values are sent.
        message_parts: the number of parts, by key/value heads, in which p2p sends each message.
    """

    mask: Mask
    layout: SequenceLayout
    exchange: str
    route: str
    num_heads: int | None = None
    num_kv_heads: int | None = None
    hierarchical_sizes: tuple[int, int] = (1, 1)
    reason: str = "asked for"
    latent: tuple[int, int] | None = None
    message_parts: int = 1

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
        latent: tuple[int, int] | None = None,
        exchange_latent: str = "auto",
        message_parts: int | None = None,
        rates: Rates = USUAL_RATES,
    ) -> Schedule:
        """Plans the exchange.

        Args:
            mask: which keys each query attends.
            layout: which rank holds which tokens, of the same length.
            exchange: one of the four above, or ``auto``, see ``choose_exchange``.
            route: ``ring``, ``direct``, or ``auto`` for the one that moves fewer keys.
            num_heads: query heads; required for a2a, a2a+p2p and ``auto``.
            num_kv_heads: key/value heads; as many as query heads by default.
            hierarchical_sizes: (A, P) of a2a+p2p.
            head_dim, v_head_dim: widths of heads; ``auto`` weighs queries and keys by them.
            latent: (L, R), the widths of the latent and of the rotary key that the keys and values
                of all heads are expanded from. The last R channels of a key are the rotary key.
            exchange_latent: ``latent`` sends latents and rotary keys, ``expanded`` sends keys and
                values, and ``auto`` sends whichever takes fewer bytes.
            message_parts: the number of parts, by key/value heads, in which p2p and a2a+p2p send a
                message; None chooses it, see ``choose_parts``. If ``auto`` takes a2a+p2p, which
                leaves a rank fewer heads, there are at most as many parts as these heads.
            rates: of network and computing, by which ``auto`` and the parts are chosen.

        Raises:
            ConfigError: a name is unknown, layout and mask differ in length, the heads cannot be
                shared or split as requested, or the product of the sizes is not the number of
                ranks.
        """
        size = layout.cp_size
        check_exchange(exchange, route, size, hierarchical_sizes)
        check_latent_exchange(exchange, exchange_latent)
        if (held := layout.shard_len * size) != mask.seq_len:
            raise ConfigError("layout", held, f"must hold the mask's {mask.seq_len} positions")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if exchange == "auto" or exchange.startswith("a2a") or latent is not None:
            check_heads(1, num_heads, kv_heads, exchange)
        plan = cls(mask, layout, exchange, route, num_heads, kv_heads)
        heads = Heads(
            num_heads=num_heads or kv_heads or 1,
            num_kv_heads=kv_heads or 1,
            head_dim=head_dim,
            v_head_dim=head_dim if v_head_dim is None else v_head_dim,
            latent=latent,
            exchange_latent=exchange_latent,
        )
        check_latent(heads)
        check_parts(message_parts, exchange, heads, hierarchical_sizes)
        plan = plan._with_exchange(heads, hierarchical_sizes, rates)
        if plan.all_to_all_size > 1:
            check_heads(plan.all_to_all_size, num_heads, kv_heads, plan.exchange)
        return plan._with_messages(heads, message_parts, rates)

    def _with_exchange(self, heads: Heads, sizes: tuple[int, int] | None, rates: Rates) -> Schedule:
        """Resolves ``auto``: which ranks exchange heads, what travels, and why."""
        layout, size = self.layout, self.layout.cp_size
        if self.exchange == "auto":
            choice = choose_exchange(
                self.mask, layout, self.readers, heads, sizes, self.route, rates
            )
            return replace(self, **vars(choice))
        if self.exchange in ("p2p", "all_gather"):
            moves = heads.latent is not None and bool(self.readers.read.any())
            latent = heads.latent_if_sent(moves=moves)
            return replace(self, hierarchical_sizes=(1, size), latent=latent)
        return replace(self, hierarchical_sizes=sizes or (size, 1))

    def _with_messages(self, heads: Heads, parts: int | None, rates: Rates) -> Schedule:
        """Resolves the route and the number of parts of a message."""
        route = choose_route(self.readers) if self.route == "auto" else self.route
        sizes = inner, groups = self.hierarchical_sizes
        if groups == 1 or self.exchange == "all_gather" or self.latent is not None:
            parts = 1
        elif parts is None:
            parts = choose_parts(self.mask, self.group_layout, heads, route, sizes, rates)
        else:
            parts = min(parts, *kv_heads_of_ranks(heads, inner))
        return replace(self, route=route, message_parts=parts)

    def within(self, mask: Mask) -> Schedule:
        """Returns the same exchange under another mask, for layers with another window."""
        return self if mask == self.mask else replace(self, mask=mask)

    @property
    def all_to_all_size(self) -> int:
        """The number of ranks that exchange heads with each other; 1 if heads stay."""
        return self.hierarchical_sizes[0]

    @cached_property
    def group_layout(self) -> SequenceLayout:
        """The tokens that each group of ``all_to_all_size`` ranks holds together, as a layout."""
        size = self.all_to_all_size
        return merged_layout(self.layout, size) if size > 1 else self.layout

    @cached_property
    def readers(self) -> Readers:
        """Which keys each group of ``all_to_all_size`` ranks reads."""
        return Readers.of(self.mask, self.group_layout)

    def rounds(self, rank: int) -> tuple[Round, ...]:
        """The rounds of ``rank``, in order. The peers of messages are ranks.

        Round 0 computes this rank's keys. Under p2p, round t computes the keys of the rank (or the
        group) t places above; under all_gather, round 1 computes all other keys.
        """
        if self.exchange == "all_gather":
            return plan_gather_rounds(self.mask, self.group_layout, self.readers, rank)
        size = self.all_to_all_size
        rounds = plan_ring(self.mask, self.group_layout, self.readers, rank // size, self.route)
        if size == 1:
            return rounds
        # A member of a group exchanges messages with the member in the same place of other groups.
        index = rank % size
        return tuple(r.with_peers(lambda group: group * size + index) for r in rounds)

    def gather(self, rank: int) -> Gather | None:
        """The part of ``rank`` in the collective of all_gather; None under other exchanges."""
        return plan_gather(self.readers, rank) if self.exchange == "all_gather" else None

    def heads(self, rank: int) -> HeadExchange | None:
        """The part of ``rank`` in the all-to-all of heads; None if heads stay."""
        if self.all_to_all_size == 1:
            return None
        assert self.num_heads is not None
        assert self.num_kv_heads is not None
        size = self.all_to_all_size
        return plan_heads(self.layout, rank, size, self.num_heads, self.num_kv_heads)

    def parts(self, rank: int) -> tuple[Span, ...]:
        """The key/value heads of each part of a message, counted from the first that ``rank`` has.

        A latent is one head, and so are heads whose number is unknown.
        """
        exchange = self.heads(rank)
        num_heads = 1 if self.latent is not None else self.num_kv_heads or 1
        if exchange is not None:
            num_heads = num_positions([exchange.kv_heads[exchange.index]])
        return even_runs(num_heads, self.message_parts)

    def pairs(self, rank: int) -> int:
        """The number of (query, key) pairs that ``rank`` computes, each for the heads it computes.

        If heads are exchanged, members of a group compute the same pairs for different heads.
        """
        return sum(tile.pairs for round_ in self.rounds(rank) for tile in round_.tiles)

    def kv_tokens_received(self, rank: int) -> int:
        """The number of key positions ``rank`` receives in forward, including those it forwards.

        Under all_gather it counts the parts of all other ranks with their padding. If heads are
        exchanged, it counts the group's other shards and then the rounds, each for the heads that
        ``rank`` computes.
        """
        size = self.layout.cp_size
        if self.exchange == "all_gather":
            return (size - 1) * gathered_width(self.readers)
        in_group = (self.all_to_all_size - 1) * self.layout.shard_len
        return in_group + int(self.readers.received[self.route][rank // self.all_to_all_size])

    def bytes_received(
        self, rank: int, head_dim: int, element_size: int, v_head_dim: int | None = None
    ) -> int:
        """The number of bytes ``rank`` receives in forward for one batch row.

        Keys and values of a position are sent together: ``head_dim + v_head_dim`` elements for each
        key/value head of the schedule, or for one head if their number is unknown. If heads are
        exchanged, queries and results count too. If latents are sent, their widths count instead.
        """
        if self.latent is not None:
            return self.kv_tokens_received(rank) * sum(self.latent) * element_size
        v_dim = head_dim if v_head_dim is None else v_head_dim
        exchange = self.heads(rank)
        if exchange is None:
            heads = self.num_kv_heads or 1
            return self.kv_tokens_received(rank) * heads * (head_dim + v_dim) * element_size
        q0, q1 = exchange.query_heads[exchange.index]
        k0, k1 = exchange.kv_heads[exchange.index]
        keys = (k1 - k0) * (head_dim + v_dim)
        in_group = (len(exchange.peers) - 1) * self.layout.shard_len
        elements = in_group * (q1 - q0) * (head_dim + v_dim)
        return (elements + self.kv_tokens_received(rank) * keys) * element_size

    def plot(self, path: str) -> None:
        """Draws an SVG file that shows which rank computes which tile in which round."""
        write_svg(self, path)
