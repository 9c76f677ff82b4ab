"""Choosing an exchange: what ``auto`` resolves to, and why.

Keys and values of a token are ``kv_heads * (head_dim + v_head_dim)`` elements. p2p sends them to
the ranks that read them, while tiles are computed. a2a sends queries, keys, values and results once
each, whatever the mask. a2a+p2p does that inside a group of neighbours and sends keys between
groups. Under a causal mask with values as wide as keys, a2a moves less if

    ranks > (query_heads + kv_heads) / (0.75 * kv_heads)

which is 7 ranks or more for 32 query and 8 key/value heads, provided that the ranks can share the
heads. But the ranks wait for all that a2a moves, while the keys of a ring arrive during the tiles
of the round before:

    p2p    keys     | k1 -> | k2 -> |                   a2a     q, k, v ->|                | out ->
           compute  | tile 0| tile 1| tile 2                              | all tiles      |

``auto`` therefore compares what the ranks wait for: the bytes of a2a, and those of p2p beyond what
(N - 1) / N of the computing hides, at the run's ``Rates``. It depends on the tokens of a rank: a
causal shard of a few thousand tokens hides its ring, one of a few hundred does not. Backward has
two to three times the bytes and 2.5 times the computing of forward, so forward alone is compared.
Under short documents p2p moves almost nothing. ``all_gather`` never moves less than p2p. It
suits networks that handle one large collective better than many messages, and ``auto`` never
chooses it.

What computing does not hide, p2p sends in parts, each for some of the key/value heads (ring.py).
``auto`` takes as many as are worth a message of their own. Nothing measures the rates: a choice
that depended on a measurement could differ when a run is resumed, and with it the order of sums.
The user states those of a network that is far slower than the default.

Keys and values that are expanded from a latent (DeepSeek-V2, arXiv:2405.04434) need not travel:
p2p and all_gather can send each token's latent and the rotary part of its key, as if they were the
key and the value of one head, and the rank that reads them expands them. a2a sends heads, which
exist only after the expansion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cp_megatron.errors import ConfigError
from cp_megatron.plan.heads import merged_layout
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.rates import USUAL_RATES, Rates
from cp_megatron.plan.readers import Readers

EXCHANGES = ("p2p", "all_gather", "a2a", "a2a+p2p")
ROUTES = ("ring", "direct")
LATENT_EXCHANGES = ("auto", "latent", "expanded")
_P2P_NAMES: Mapping[str, str] = MappingProxyType({"expanded": "p2p", "latent": "p2p of latents"})
"""What ``auto`` calls p2p of keys and values, and of the latents that they are expanded from."""
MOST_PARTS = 4
"""Parts of a message that are chosen at most: with four, all but a quarter of the tiles of a round
can run while its keys arrive."""
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
        latent: the widths of a latent and a rotary key if these are sent; None if keys and values
            are sent.
    """

    exchange: str
    route: str
    hierarchical_sizes: Sizes
    reason: str
    latent: Sizes | None = None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Number and width of the heads.

    Attributes:
        num_heads, num_kv_heads: the numbers of query heads and of key/value heads.
        head_dim, v_head_dim: the widths of a query or key head and of a value head.
        latent: the widths of the latent and of the rotary key that keys and values are expanded
            from; None if there is no latent.
        exchange_latent: which of the two forms may be sent, one of ``LATENT_EXCHANGES``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int = 1
    v_head_dim: int = 1
    latent: Sizes | None = None
    exchange_latent: str = "auto"

    @property
    def key_width(self) -> int:
        """Elements of the keys and values of one token and head."""
        return self.head_dim + self.v_head_dim

    @property
    def sent_widths(self) -> dict[str, int]:
        """Elements of one token under p2p and all_gather, for each form that may be sent."""
        widths = {"expanded": self.num_kv_heads * self.key_width}
        if self.latent is not None:
            widths["latent"] = sum(self.latent)
            if self.exchange_latent != "auto":
                return {self.exchange_latent: widths[self.exchange_latent]}
        return widths

    def latent_if_sent(self, *, moves: bool) -> Sizes | None:
        """Chooses what p2p and all_gather send.

        Args:
            moves: whether any token moves. If none does, heads are better, which a rank expands
                once, unless latents are asked for.

        Returns:
            The widths of the latent and the rotary key if these are sent, None if heads are.
        """
        widths = self.sent_widths
        narrowest = min(widths, key=lambda form: (widths[form] if moves else 0, form))
        return self.latent if narrowest == "latent" else None


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


def check_latent_exchange(exchange: str, exchange_latent: str) -> None:
    """Checks whether an exchange can send what is asked for, without regard to the heads.

    Raises:
        ConfigError: the name is unknown, or latents cannot travel by ``exchange``.
    """
    flag = "--cp-latent-exchange"
    if exchange_latent not in LATENT_EXCHANGES:
        works = ", ".join(LATENT_EXCHANGES)
        raise ConfigError(flag, exchange_latent, "is not a way to exchange latents", works)
    if exchange_latent == "latent" and exchange.startswith("a2a"):
        rule = f"contradicts --cp-comm-type {exchange}, which exchanges expanded heads"
        raise ConfigError(flag, exchange_latent, rule, "--cp-comm-type p2p or all_gather")


def check_parts(parts: int | None, exchange: str, heads: Heads, sizes: Sizes | None) -> None:
    """Checks whether messages can be sent in as many parts as asked for.

    Args:
        parts: the number; None leaves the choice to ``choose_parts``.
        exchange: as asked for, or ``auto``.
        heads: of the attention.
        sizes: of a2a+p2p.

    Raises:
        ConfigError: the exchange has no messages to split, or a rank has fewer heads than parts.
    """
    flag = "--cp-message-parts"
    if parts is None:
        return
    if exchange in ("all_gather", "a2a") and parts > 1:
        rule = f"has no effect with --cp-comm-type {exchange}"
        raise ConfigError(flag, parts, rule, "1, or --cp-comm-type p2p or a2a+p2p")
    inner = sizes[0] if sizes and exchange == "a2a+p2p" else 1
    most = min(kv_heads_of_ranks(heads, inner))
    if not 1 <= parts <= most:
        rule = f"must be at least 1 and at most the key/value heads of a rank, {most}"
        raise ConfigError(flag, parts, rule, str(min(max(parts, 1), most)))
    sends_heads = heads.exchange_latent == "expanded" or exchange == "a2a+p2p"
    if parts > 1 and heads.latent is not None and not sends_heads:
        rule = "splits messages between heads, and a latent has none"
        raise ConfigError(flag, parts, rule, "--cp-latent-exchange expanded")


def check_latent(heads: Heads) -> None:
    """Checks that heads can be expanded from their latent.

    Raises:
        ConfigError: there is no latent to send, or the numbers or widths of heads do not fit it.
    """
    way = heads.exchange_latent
    if heads.latent is None:
        if way != "auto":
            rule = "has no effect without latent attention"
            raise ConfigError("--cp-latent-exchange", way, rule, "auto")
        return
    widths = " ".join(map(str, heads.latent))
    if min(heads.latent) < 1 or heads.latent[1] >= heads.head_dim:
        rule = f"must be positive, and the second less than the head width {heads.head_dim}"
        raise ConfigError("latent", widths, rule)
    if heads.num_kv_heads != heads.num_heads:
        rule = f"is expanded to a key/value head for each of {heads.num_heads} query heads"
        raise ConfigError("latent", widths, f"{rule}, not to {heads.num_kv_heads}")


def choose_exchange(
    mask: Mask,
    layout: SequenceLayout,
    readers: Readers,
    heads: Heads,
    hierarchical_sizes: Sizes | None = None,
    route: str = "auto",
    rates: Rates = USUAL_RATES,
) -> ExchangeChoice:
    """Chooses the exchange whose ranks together wait for the fewest elements; among equals the one
    that moves the fewest, and then p2p.

    Args:
        mask, layout, readers, heads: of the attention.
        hierarchical_sizes: the number of ranks that share a node, and the number of nodes. It makes
            a2a+p2p a candidate instead of a2a over all ranks, which would cross nodes with
            everything.
        route: ``ring`` or ``direct``, or ``auto`` to choose it as well.
        rates: of network and computing.
    """
    size = layout.cp_size
    inner_route = "ring" if route == "auto" else route
    if size == 1:
        reason, latent = "one rank exchanges nothing", heads.latent_if_sent(moves=False)
        return ExchangeChoice("p2p", inner_route, (1, 1), reason, latent)
    p2p_route = choose_route(readers) if route == "auto" else route
    tokens = readers.tokens_received(p2p_route)
    costs = {_P2P_NAMES[form]: tokens * width for form, width in heads.sent_widths.items()}
    hidden = _hidden(mask, heads, size, rates)
    waits = {form: max(0, cost - hidden) for form, cost in costs.items()}
    inner, name = (hierarchical_sizes[0], "a2a+p2p") if hierarchical_sizes else (size, "a2a")
    notes = []
    if "expanded" not in heads.sent_widths:
        notes.append(f"{name} cannot send latents")
    elif heads.num_heads % inner:
        notes.append(f"{name} cannot share {heads.num_heads} heads among {inner}")
    else:
        costs[name] = waits[name] = all_to_all_elements(layout, heads, inner)
        if inner < size:
            between = Readers.of(mask, merged_layout(layout, inner))
            inner_route = choose_route(between) if route == "auto" else route
            tokens = between.tokens_received(inner_route)
            moved = tokens * sum(kv_heads_of_ranks(heads, inner)) * heads.key_width
            costs[name] += moved
            waits[name] += max(0, moved - _hidden(mask, heads, size // inner, rates))
    # The first of equals.
    best = min(costs, key=lambda exchange: (waits[exchange], costs[exchange]))
    reason = _reason(best, costs, waits[best], notes)
    latent = heads.latent if best == _P2P_NAMES["latent"] else None
    if best != name:
        return ExchangeChoice("p2p", p2p_route, (1, size), reason, latent)
    return ExchangeChoice(best, inner_route, (inner, size // inner), reason)


def choose_parts(
    mask: Mask, layout: SequenceLayout, heads: Heads, route: str, sizes: Sizes, rates: Rates
) -> int:
    """Chooses in how many parts p2p and a2a+p2p send a message, alike on all ranks.

    It is one if the ranks together compute long enough to hide all messages.

    Args:
        mask, heads: of the attention.
        layout: of the groups of ranks that send keys to each other.
        route: ``ring`` or ``direct``.
        sizes: the size of such a group, and the number of groups.
        rates: of network and computing.
    """
    inner, groups = sizes
    kv_heads = kv_heads_of_ranks(heads, inner)
    longest = layout.shard_len * max(kv_heads) * heads.key_width
    if groups == 1 or longest < 2 * rates.least_part:
        return 1
    moved = Readers.of(mask, layout).tokens_received(route) * sum(kv_heads) * heads.key_width
    if moved <= _hidden(mask, heads, groups, rates):
        return 1
    message = moved // (inner * groups * (groups - 1))
    return max(1, min(*kv_heads, MOST_PARTS, message // rates.least_part))


def _hidden(mask: Mask, heads: Heads, num_rounds: int, rates: Rates) -> int:
    """Elements that all ranks together can receive while they compute: in all rounds but one."""
    flops = 2 * mask.pairs() * heads.num_heads * heads.key_width
    return int(flops * (num_rounds - 1) // num_rounds / rates.flops_per_element)


def _reason(best: str, costs: Mapping[str, int], waits: int, notes: Sequence[str]) -> str:
    """Says how many times the elements of ``best`` the other exchanges move, then ``notes``."""
    least = costs[best]
    others = [
        f"{other} {f'{cost / least:.2g}x' if least else 'some'}"
        for other, cost in costs.items()
        if other != best and cost
    ]
    verdict = "moves nothing"
    if least > min(costs.values()):
        verdict = "waits for the fewest bytes" if waits else "hides its messages behind computing"
    elif least:
        verdict = "moves the fewest bytes"
    return ", ".join([verdict, *others, *notes])


def choose_route(readers: Readers) -> str:
    """Chooses the route that moves fewer keys; the ring, which uses neighbour links, wins a tie."""
    ring, direct = (readers.tokens_received(route) for route in ROUTES)
    return "ring" if ring <= direct else "direct"


def all_to_all_elements(layout: SequenceLayout, heads: Heads, size: int) -> int:
    """Elements that all ranks receive if groups of ``size`` exchange q, k, v and results."""
    width = (heads.num_heads + sum(kv_heads_of_ranks(heads, size))) * heads.key_width
    return layout.cp_size // size * (size - 1) * layout.shard_len * width


def kv_heads_of_ranks(heads: Heads, size: int) -> list[int]:
    """The number of key/value heads that each rank of a group computes."""
    share, serves = heads.num_heads // size, heads.num_heads // heads.num_kv_heads
    return [-(-(i + 1) * share // serves) - i * share // serves for i in range(size)]
