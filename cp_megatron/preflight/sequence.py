"""How context parallel ranks share a row: its mask, padding, layout and exchange.

All of this is known before the first row is read. Packed documents are the exception: their layout
and the exchange that ``auto`` chooses depend on the batch, and ``ContextParallel`` computes them
for each batch with the same functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.data.rows.packing import row_mask
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid, Mask, Rates, Schedule, SequenceLayout
from cp_megatron.plan.exchange import (
    Heads,
    Sizes,
    check_exchange,
    check_latent_exchange,
    check_parts,
)
from cp_megatron.plan.layout import auto_layout, sequence_divisor
from cp_megatron.preflight.rules import multiples, refuse_unused
from cp_megatron.spec import local_heads

_RATES = "cp_network_rate", "cp_attention_rate"


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """How a row is shared.

    Attributes:
        mask: the mask of every row. If documents are masked, it is that of a row of one document,
            and each batch has its own instead.
        per_batch: each batch has its own mask, and a layout and exchange that follow from it.
        padding: tokens appended to each row.
        layout: which context parallel rank holds which positions. If documents are masked and the
            layout is ``balanced``, batches share only its kind and its number of tokens.
        exchange: how keys and values reach the queries; ``none`` on one rank, ``auto`` if each
            batch decides.
        route: the route of the exchange's messages; ``auto`` if each batch decides.
        sizes: ``hierarchical_sizes`` of ``ContextParallel``.
        message_parts: the parts of each message; None if each batch decides, or without messages.
        rates: by which each batch decides.
        reason: why this exchange was chosen.
        notes: consequences worth knowing, for the start table.
    """

    mask: Mask
    per_batch: bool
    padding: int
    layout: SequenceLayout
    exchange: str
    route: str
    sizes: Sizes | None
    message_parts: int | None
    rates: Rates
    reason: str
    notes: tuple[str, ...] = ()

    @property
    def row_length(self) -> int:
        """Tokens of one row of the model's input, padding included."""
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
    """Plans how the rows of this run are shared.

    Args:
        config: the run; its model has been checked.
        grid: the ranks.
        launch: how many of them share a node.
        rows: rows that are packed into one.
        given: flags the user typed; one of them without an effect is refused.
        one_node: the launch does not tell where the ranks will be: assume one node.

    Raises:
        ConfigError: the row or the heads cannot be split as requested.
    """
    per_batch = config.data.document_mask
    length = config.data.seq_length * rows
    kind = _layout_kind(config, length)
    padding, notes = _padding(config, grid, kind, length)
    mask = row_mask(
        [length + padding] if per_batch else [length],
        document_mask=False,
        window=config.model.row_window,
        padding=0 if per_batch else padding,
    )
    _check_exchange(config, grid, given)
    plan = SequencePlan(
        mask=mask,
        per_batch=per_batch,
        padding=padding,
        layout=SequenceLayout.make(mask, grid.cp, kind),
        exchange="none",
        route="auto",
        sizes=None,
        message_parts=None,
        rates=Rates(config.parallel.cp_network_rate, config.parallel.cp_attention_rate),
        reason="one rank holds the whole sequence",
        notes=notes,
    )
    if grid.cp == 1:
        return plan
    return _with_exchange(plan, config, grid, launch, one_node)


def ranks_together(grid: Grid, ranks_per_node: int) -> int:
    """The largest number of cp neighbours that share a node in every context parallel group.

    Neighbours are ``tp`` ranks apart. So A of them, starting at any multiple of A, take up A x tp
    consecutive ranks, which all lie on one node if and only if A x tp divides the ranks of a node::

        8 ranks a node, tp 2, cp 8       node 0: 0 2 4 6 | node 1: 8 10 12 14       A = 4
    """
    if grid.world_size <= ranks_per_node:
        return grid.cp
    if ranks_per_node % grid.tp:
        return 1
    return math.gcd(grid.cp, ranks_per_node // grid.tp)


def _layout_kind(config: Config, length: int) -> str:
    asked = config.parallel.cp_layout
    if asked != "auto":
        return asked
    # The padding must fit every batch, so the kind cannot depend on a batch's documents.
    packed = Mask.documents([1, length])
    return auto_layout(packed if config.data.document_mask else Mask.causal(length))


def _padding(config: Config, grid: Grid, kind: str, length: int) -> tuple[int, tuple[str, ...]]:
    """Tokens to append to a row of ``length`` so that it can be split evenly, and a note."""
    splits_sequence = config.parallel.sequence_parallel and grid.tp > 1
    every = grid.cp * grid.tp if splits_sequence else 1
    divisor = math.lcm(sequence_divisor(kind, grid.cp), every)
    padding = -length % divisor
    if not padding:
        return 0, ()
    needs = [f"the {kind} layout on --context-parallel-size {grid.cp}"] if grid.cp > 1 else []
    if splits_sequence:
        needs.append(f"--sequence-parallel on --tensor-parallel-size {grid.tp}")
    # A packed row is several rows long, which may already contain a part of the divisor.
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


def _with_exchange(
    plan: SequencePlan, config: Config, grid: Grid, launch: Launch, one_node: bool
) -> SequencePlan:
    """The plan with the requested exchange, or with the best one."""
    parallel, notes = config.parallel, plan.notes
    exchange: str = parallel.cp_comm_type
    route: str = parallel.cp_route
    sizes, parts = parallel.hierarchical_context_parallel_sizes, parallel.cp_message_parts
    reason = "" if exchange == "auto" else "asked for"
    is_free = exchange == "auto" and sizes is None
    if is_free:
        together = grid.cp if one_node else ranks_together(grid, launch.local_world_size)
        if together == 1:
            exchange = "p2p"
            reason = "every rank of a context parallel group is on a node of its own"
        elif together < grid.cp:
            sizes = together, grid.cp // together
    if plan.per_batch:
        reason = reason or "each batch takes what ranks wait for least"
    else:
        heads, kv_heads, width, v_width = local_heads(config.model, grid.tp)
        build = partial(Schedule.build, head_dim=width, v_head_dim=v_width, rates=plan.rates)
        schedule = build(
            *(plan.mask, plan.layout, exchange, route, heads, kv_heads, sizes),
            latent=config.model.latent_widths,
            exchange_latent=parallel.cp_latent_exchange,
            message_parts=parts,
        )
        if schedule.latent is not None:
            notes = (*notes, "latents are sent, and the heads that they expand to are not")
        exchange, route, reason = schedule.exchange, schedule.route, reason or schedule.reason
        sizes = schedule.hierarchical_sizes if exchange == "a2a+p2p" else None
        wanted, parts = parts, schedule.message_parts
        if wanted is not None and parts != wanted:
            notes = (*notes, f"{exchange} sends messages in {parts} parts, not {wanted}")
        parts = parts if exchange in ("p2p", "a2a+p2p") else None
    if one_node and is_free and exchange != "p2p":  # p2p moves the same bytes on any nodes
        note = "the nodes are not known: the exchange is chosen as if one node had all ranks"
        notes = (*notes, note)
    plan = replace(plan, exchange=exchange, route=route, sizes=sizes, message_parts=parts)
    return replace(plan, reason=reason, notes=notes)


def _check_exchange(config: Config, grid: Grid, given: frozenset[str]) -> None:
    """Refuses an exchange that contradicts the other flags or that the heads do not allow."""
    parallel = config.parallel
    exchange, route = parallel.cp_comm_type, parallel.cp_route
    sizes = parallel.hierarchical_context_parallel_sizes
    check_exchange(exchange, route, grid.cp, sizes)
    check_latent_exchange(exchange, parallel.cp_latent_exchange)
    if not config.model.multi_latent_attention:
        reason = "without --multi-latent-attention"
        works = "--multi-latent-attention with it"
        refuse_unused(parallel, ["cp_latent_exchange"], given, reason=reason, works=works)
    if exchange in ("a2a", "all_gather") and "--cp-route" in given:
        rule = f"has no effect with --cp-comm-type {exchange}"
        raise ConfigError("--cp-route", route, rule, "--cp-comm-type p2p or a2a+p2p")
    if grid.cp > 1 and (exchange.startswith("a2a") or sizes):
        _check_heads(config, sizes[0] if sizes else grid.cp)
    heads, kv_heads, width, v_width = local_heads(config.model, grid.tp)
    asked = Heads(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        v_head_dim=v_width,
        latent=config.model.latent_widths,
        exchange_latent=parallel.cp_latent_exchange,
    )
    if grid.cp > 1:
        check_parts(parallel.cp_message_parts, exchange, asked, sizes)
    else:
        reason, works = "on one context parallel rank", "--context-parallel-size 2 with it"
        unused = ["cp_message_parts", *_RATES]
        refuse_unused(parallel, unused, given, reason=reason, works=works)
    decided = exchange in ("all_gather", "a2a") or parallel.cp_message_parts is not None
    if exchange != "auto" and decided:
        reason, works = "if exchange and parts are asked for", "--cp-comm-type auto with it"
        refuse_unused(parallel, _RATES, given, reason=reason, works=works)


def _check_heads(config: Config, ranks: int) -> None:
    """Refuses query heads that ``ranks`` cannot share, and names the flags they come from."""
    parallel, tp = config.parallel, config.parallel.tensor_parallel_size
    heads = local_heads(config.model, tp).heads
    if not heads % ranks:
        return
    made = f"--num-attention-heads {config.model.num_attention_heads}"
    made += f" / --tensor-parallel-size {tp}" if tp > 1 else ""
    rule = f"{ranks} ranks cannot share {heads} query heads ({made})"
    cp = parallel.context_parallel_size
    fitting = [size for size in range(2, cp) if not cp % size and not heads % size]
    flag = "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes"
    pairs = [f"{flag} {size} {cp // size}" for size in fitting[-1:]]
    works = " or ".join([*pairs, "--cp-comm-type p2p"])
    raise ConfigError("--cp-comm-type", parallel.cp_comm_type, rule, works)
