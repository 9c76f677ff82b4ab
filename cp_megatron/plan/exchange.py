"""Choosing an exchange: what ``auto`` resolves to, and why.

Keys and values of a token are ``kv_heads * (head_dim + v_head_dim)`` elements. p2p sends them to
the ranks that read them, while tiles are computed. a2a sends queries, keys, values and results once
each, whatever the mask. a2a+p2p does that inside a group of neighbours and sends keys between
groups. Under a causal mask with values as wide as keys, a2a moves less if

    ranks > (query_heads + kv_heads) / (0.75 * kv_heads)

which is 7 ranks or more for 32 query and 8 key/value heads, provided that the ranks can share the
heads. Under short documents p2p moves almost nothing. ``all_gather`` never moves less than p2p. It
suits networks that handle one large collective better than many messages, and ``auto`` never
chooses it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cp_megatron.errors import ConfigError
from cp_megatron.plan.heads import merged_layout
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.readers import Readers

EXCHANGES = ("p2p", "all_gather", "a2a", "a2a+p2p")
ROUTES = ("ring", "direct")
Sizes = tuple[int, int]


@dataclass(frozen=True)
class ExchangeChoice:
    """An exchange and the reason that is shown to the user.

    Attributes:
        exchange: one of ``EXCHANGES``.
        route: how the p2p part sends, ``ring`` or ``direct``.
        hierarchical_sizes: the size of a group of ranks that exchange heads, and the number of
            groups: ``(1, N)`` is p2p, ``(N, 1)`` is a2a.
        reason: why this exchange was chosen.
    """

    exchange: str
    route: str
    hierarchical_sizes: Sizes
    reason: str


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Number and width of the heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int = 1
    v_head_dim: int = 1

    @property
    def key_width(self) -> int:
        """Elements of the keys and values of one token and head."""
        return self.head_dim + self.v_head_dim


def check_exchange(
    exchange: str, route: str, cp_size: int, hierarchical_sizes: Sizes | None
) -> None:
    """Checks an exchange without regard to mask and heads.

    Raises:
        ConfigError: a name is unknown, or the sizes are missing, superfluous or do not fit.
    """
    if exchange not in ("auto", *EXCHANGES):
        works = ", ".join(("auto", *EXCHANGES))
        raise ConfigError("--cp-comm-type", exchange, "is not an exchange", works)
    if route not in ("auto", *ROUTES):
        raise ConfigError("route", route, "is not a route", ", ".join(("auto", *ROUTES)))
    flag = "--hierarchical-context-parallel-sizes"
    pairs = [(a, cp_size // a) for a in range(1, cp_size + 1) if cp_size % a == 0]
    works = " or ".join(f"{a} {p}" for a, p in pairs if 1 < a < cp_size or len(pairs) < 3)
    if hierarchical_sizes is None:
        if exchange == "a2a+p2p":
            raise ConfigError(flag, None, "a2a+p2p needs two sizes", works)
        return
    sizes, given = hierarchical_sizes, " ".join(map(str, hierarchical_sizes))
    if exchange not in ("auto", "a2a+p2p"):
        rule = f"belongs to a2a+p2p, not to {exchange}"
        raise ConfigError(flag, given, rule, "--cp-comm-type a2a+p2p")
    whole = all(isinstance(size, int) for size in sizes)
    if len(sizes) != 2 or not whole or min(sizes) < 1 or sizes[0] * sizes[1] != cp_size:
        rule = f"must be two sizes whose product is --context-parallel-size {cp_size}"
        raise ConfigError(flag, given, rule, works)


def choose_exchange(
    mask: Mask,
    layout: SequenceLayout,
    readers: Readers,
    heads: Heads,
    hierarchical_sizes: Sizes | None = None,
    route: str = "auto",
) -> ExchangeChoice:
    """Chooses the exchange whose ranks together receive the fewest elements; p2p wins a tie.

    Args:
        mask, layout, readers, heads: of the attention.
        hierarchical_sizes: the number of ranks that share a node, and the number of nodes. It makes
            a2a+p2p a candidate instead of a2a over all ranks, which would cross nodes with
            everything.
        route: ``ring`` or ``direct``, or ``auto`` to choose it as well.
    """
    size = layout.cp_size
    inner_route = "ring" if route == "auto" else route
    if size == 1:
        return ExchangeChoice("p2p", inner_route, (1, 1), "one rank exchanges nothing")
    p2p_route = choose_route(readers) if route == "auto" else route
    costs = {"p2p": readers.tokens_received(p2p_route) * heads.num_kv_heads * heads.key_width}
    inner = hierarchical_sizes[0] if hierarchical_sizes else size
    name = "a2a+p2p" if hierarchical_sizes else "a2a"
    notes = []
    if heads.num_heads % inner:
        notes.append(f"{name} cannot share {heads.num_heads} heads among {inner}")
    else:
        costs[name] = all_to_all_elements(layout, heads, inner)
        if inner < size:
            merged = merged_layout(layout, inner)
            between = Readers.of(mask, merged)
            inner_route = choose_route(between) if route == "auto" else route
            moved = between.tokens_received(inner_route) * _computed_kv_heads(heads, inner)
            costs[name] += moved * heads.key_width
    best = min(costs, key=lambda exchange: (costs[exchange], exchange != "p2p"))
    least = costs[best]
    others = [
        f"{other} {f'{cost / least:.2g}x' if least else 'some'}"
        for other, cost in costs.items()
        if other != best
    ]
    verdict = "moves the fewest bytes" if least else "moves nothing"
    reason = ", ".join([verdict, *others, *notes])
    if best == "p2p":
        return ExchangeChoice(best, p2p_route, (1, size), reason)
    return ExchangeChoice(best, inner_route, (inner, size // inner), reason)


def choose_route(readers: Readers) -> str:
    """Chooses the route that moves fewer keys; the ring, which uses neighbour links, wins a tie."""
    ring, direct = (readers.tokens_received(route) for route in ROUTES)
    return "ring" if ring <= direct else "direct"


def all_to_all_elements(layout: SequenceLayout, heads: Heads, size: int) -> int:
    """Elements that all ranks receive if groups of ``size`` exchange q, k, v and results."""
    width = (heads.num_heads + _computed_kv_heads(heads, size)) * heads.key_width
    return layout.cp_size // size * (size - 1) * layout.shard_len * width


def _computed_kv_heads(heads: Heads, size: int) -> int:
    """Key/value heads that the ranks of a group compute, counted once for each of them."""
    share, serves = heads.num_heads // size, heads.num_heads // heads.num_kv_heads
    return sum(-(-(i + 1) * share // serves) - i * share // serves for i in range(size))
