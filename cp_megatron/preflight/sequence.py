"""How context parallel ranks share a row: mask, padding, layout, exchange. No torch.

All of it is known before the first row is read, but for packed documents: their layout and what
``auto`` takes for an exchange follow from each batch, and are worked out by ``ContextParallel``
with the same functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.data.rows.packing import row_mask
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid, Mask, Schedule, SequenceLayout
from cp_megatron.plan.exchange import Sizes, check_exchange
from cp_megatron.plan.layout import auto_layout, sequence_divisor
from cp_megatron.preflight.rules import multiples
from cp_megatron.spec import local_heads


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """How a row is shared.

    Attributes:
        mask: of every row; where documents are masked, of a row that is one document, in whose
            place each batch puts its own.
        per_batch: each batch has its own mask, and what follows from it.
        padding: tokens put behind each row.
        layout: which context parallel rank holds which positions; where documents are masked and
            the layout is ``balanced``, only its kind and the number of tokens are every batch's.
        exchange: how keys and values reach the queries; ``none`` on one rank, ``auto`` where each
            batch decides.
        route: of the exchange's messages; ``auto`` where each batch decides.
        sizes: ranks that trade heads and groups of them, as ``ContextParallel`` takes them.
        reason: why this exchange.
        notes: what a person should know of it, for the start table.
    """

    mask: Mask
    per_batch: bool
    padding: int
    layout: SequenceLayout
    exchange: str
    route: str
    sizes: Sizes | None
    reason: str
    notes: tuple[str, ...] = ()

    @property
    def row_length(self) -> int:
        """Tokens of what the model sees as one row, padding included."""
        return self.mask.seq_len


def plan_sequence(
    config: Config,
    grid: Grid,
    launch: Launch,
    *,
    rows: int,
    given: frozenset[str] = frozenset(),
    one_node: bool = False,
) -> SequencePlan:
    """How the rows of this run are shared.

    Args:
        config: the run; its model is sound.
        grid: the ranks.
        launch: says how many of them share a node.
        rows: rows that are packed into one.
        given: flags the user typed; one of them without an effect is refused.
        one_node: the launch does not say where ranks will be: take one node for all.

    Raises:
        ConfigError: the row can not be cut, or the heads not be shared, as asked.
    """
    per_batch = config.data.document_mask
    length = config.data.seq_length * rows
    kind = _layout_kind(config, length)
    padding, padded = _padding(config, grid, kind, length)
    mask = row_mask(
        [length + padding] if per_batch else [length],
        document_mask=False,
        window=config.model.row_window,
        padding=0 if per_batch else padding,
    )
    layout = SequenceLayout.make(mask, grid.cp, kind)
    choice = _Exchange.of(config, grid, mask, layout, given, _nodes(grid, launch, one_node))
    # p2p moves the same bytes wherever ranks are.
    unknown = one_node and choice.considered_nodes and choice.exchange != "p2p"
    note = "where ranks are is not known: the exchange is chosen as if one node had them all"
    return SequencePlan(
        mask=mask,
        per_batch=per_batch,
        padding=padding,
        layout=layout,
        exchange=choice.exchange,
        route=choice.route,
        sizes=choice.sizes,
        reason=choice.reason,
        notes=(*padded, note) if unknown else padded,
    )


def ranks_together(grid: Grid, ranks_per_node: int) -> int:
    """The most neighbours on the cp axis that share a node in every context parallel group.

    Neighbours are ``tp`` ranks apart, so A of them, starting at any multiple of A, take up A x tp
    consecutive ranks; these never cross into the next node iff A x tp divides its ranks::

        8 ranks a node, tp 2, cp 8       node 0: 0 2 4 6 | node 1: 8 10 12 14       A = 4
    """
    if grid.world_size <= ranks_per_node:
        return grid.cp
    if ranks_per_node % grid.tp:
        return 1
    return math.gcd(grid.cp, ranks_per_node // grid.tp)


def _nodes(grid: Grid, launch: Launch, one_node: bool) -> Sizes | None:
    """(ranks of a context parallel group on a node, nodes of a group); None where one has all."""
    together = grid.cp if one_node else ranks_together(grid, launch.local_world_size)
    return None if together == grid.cp else (together, grid.cp // together)


def _layout_kind(config: Config, length: int) -> str:
    asked = config.parallel.cp_layout
    if asked != "auto":
        return asked
    # Of several documents, whatever a batch has: the padding must fit every batch.
    packed = Mask.documents([1, length])
    return auto_layout(packed if config.data.document_mask else Mask.causal(length))


def _padding(config: Config, grid: Grid, kind: str, length: int) -> tuple[int, tuple[str, ...]]:
    """Tokens to put behind a row of ``length`` so that all that cuts it divides it; a note."""
    splits_sequence = config.parallel.sequence_parallel and grid.tp > 1
    every = grid.cp * grid.tp if splits_sequence else 1
    divisor = math.lcm(sequence_divisor(kind, grid.cp), every)
    padding = -length % divisor
    if not padding:
        return 0, ()
    needs = [f"the {kind} layout on --context-parallel-size {grid.cp}"] if grid.cp > 1 else []
    if splits_sequence:
        needs.append(f"--sequence-parallel on --tensor-parallel-size {grid.tp}")
    # Whole rows are packed, and each may bring a factor of its own.
    unit = divisor // math.gcd(divisor, length // config.data.seq_length)
    fits = padding <= config.data.seq_length  # learned positions end at the sequence length
    if config.data.pad_rows and fits:
        rule = f"a multiple of {divisor} for {' and '.join(needs)}"
        note = f"rows of {length:,} tokens are padded to {length + padding:,}, {rule}"
        return padding, (f"{note}; the padding has no loss",)
    works = multiples(config.data.seq_length, unit)
    if not length % math.lcm(sequence_divisor("contiguous", grid.cp), every):
        works += ", or --cp-layout contiguous"
    elif fits:
        works += ", or --pad-rows"
    rule = f"must be a multiple of {unit} for {' and '.join(needs)}"
    raise ConfigError("--seq-length", config.data.seq_length, rule, works)


@dataclass(frozen=True, kw_only=True)
class _Exchange:
    """What was chosen, and whether the place of ranks had a say in it."""

    exchange: str
    route: str
    sizes: Sizes | None
    reason: str
    considered_nodes: bool = False

    @classmethod
    def of(
        cls,
        config: Config,
        grid: Grid,
        mask: Mask,
        layout: SequenceLayout,
        given: frozenset[str],
        nodes: Sizes | None,
    ) -> _Exchange:
        """The exchange asked for, or the best."""
        parallel = config.parallel
        asked, route = parallel.cp_comm_type, parallel.cp_route
        sizes = parallel.hierarchical_context_parallel_sizes
        check_exchange(asked, route, grid.cp, sizes)
        if asked in ("a2a", "all_gather") and "--cp-route" in given:
            rule = f"has no effect with --cp-comm-type {asked}"
            raise ConfigError("--cp-route", route, rule, "--cp-comm-type p2p or a2a+p2p")
        if grid.cp == 1:
            reason = "one rank holds the whole sequence"
            return cls(exchange="none", route="auto", sizes=None, reason=reason)
        if asked.startswith("a2a") or sizes:
            _check_heads(config, sizes[0] if sizes else grid.cp)
        free = asked == "auto" and sizes is None
        if free and nodes and nodes[0] == 1:
            asked, nodes = "p2p", None
            why = "every rank of a context parallel group is on a node of its own"
        elif asked == "auto":
            why = ""
        else:
            why = "asked for"
        sizes = nodes if free else sizes
        if config.data.document_mask:
            why = why or "each batch takes what moves the fewest bytes"
            return cls(exchange=asked, route=route, sizes=sizes, reason=why, considered_nodes=free)
        heads, kv_heads = local_heads(config.model, grid.tp)
        schedule = Schedule.build(
            mask, layout, asked, route, heads, kv_heads, sizes, head_dim=config.model.head_dim
        )
        return cls(
            exchange=schedule.exchange,
            route=schedule.route,
            sizes=schedule.hierarchical_sizes if schedule.exchange == "a2a+p2p" else None,
            reason=why or schedule.reason,
            considered_nodes=free,
        )


def _check_heads(config: Config, ranks: int) -> None:
    """Query heads that ``ranks`` can share; told in the flags that make them."""
    parallel, tp = config.parallel, config.parallel.tensor_parallel_size
    heads, _ = local_heads(config.model, tp)
    if not heads % ranks:
        return
    made = f"--num-attention-heads {config.model.num_attention_heads}"
    made += f" / --tensor-parallel-size {tp}" if tp > 1 else ""
    rule = f"{ranks} ranks can not share {heads} query heads ({made})"
    cp = parallel.context_parallel_size
    fitting = [size for size in range(2, cp) if not cp % size and not heads % size]
    pairs = [f"--hierarchical-context-parallel-sizes {size} {cp // size}" for size in fitting]
    works = " or ".join([f"--cp-comm-type a2a+p2p {pair}" for pair in pairs[-1:]])
    works = f"{works} or --cp-comm-type p2p" if works else "--cp-comm-type p2p"
    raise ConfigError("--cp-comm-type", parallel.cp_comm_type, rule, works)
