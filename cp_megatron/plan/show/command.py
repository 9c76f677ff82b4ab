"""The command line of ``python -m cp_megatron.plan``: its flags, and the schedule they describe."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from rich.console import Console

from cp_megatron.config.schema.parallel_config import Exchange, LayoutKind, Route
from cp_megatron.config.schema.ranges import Range
from cp_megatron.config.words import read_options
from cp_megatron.errors import ConfigError
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.schedule import Schedule
from cp_megatron.plan.show.text import print_rank, print_schedule

PROGRAM = "python -m cp_megatron.plan"
MEDIAN_LENGTH, SIGMA = 3000, 1.5
AtLeastOne = Annotated[int, Range(1)]
WindowEnd = Annotated[int, Range(-1)]
_DESCRIPTION = f"""Print and draw a schedule: who holds which tokens, who computes which tiles of
the attention matrix in which round, who sends what to whom. No GPU, no torch, any number of ranks.

{PROGRAM} --mask documents --documents 900 100 3000 96 --context-parallel-size 4 --svg plan.svg"""
_ELEMENT_SIZES: Mapping[str, int] = types.MappingProxyType(
    {"bfloat16": 2, "float32": 4, "float64": 8}
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to plan. A field is a flag, its docstring the flag's help."""

    mask: Literal["causal", "full", "documents"] | None = None
    """What attends to what; documents if any are given, else causal."""
    seq_length: AtLeastOne | None = None
    """Tokens of the row; by default what --documents add up to, else 8,192."""
    documents: tuple[AtLeastOne, ...] | None = None
    """The lengths of the packed documents."""
    documents_random: Annotated[int, Range(0)] | None = None
    """A seed: log-normal document lengths of median 3,000, sigma 1.5, until the row is full."""
    bidirectional: bool = False
    """Documents are attended in both directions; --mask full always is."""
    window: tuple[WindowEnd, WindowEnd] | None = None
    """LEFT RIGHT: query q sees keys q - LEFT to q + RIGHT; -1 is unlimited, causal ends at q."""
    context_parallel_size: AtLeastOne = 4
    """Ranks that share the row."""
    cp_layout: LayoutKind = "auto"
    """Which rank holds which part of the row."""
    cp_comm_type: Exchange = "auto"
    """How keys and values reach the queries; auto is what moves least, and says why."""
    cp_route: Route = "auto"
    """p2p: from neighbour to neighbour, or straight from the owner."""
    hierarchical_context_parallel_sizes: tuple[int, int] | None = None
    """a2a+p2p: ranks that trade heads, and groups of them."""
    num_attention_heads: AtLeastOne = 32
    """Query heads."""
    num_query_groups: AtLeastOne = 8
    """Key/value heads."""
    head_dim: AtLeastOne = 128
    """Width of a query and key head."""
    v_head_dim: AtLeastOne | None = None
    """Width of a value head; by default the same."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """What the bytes are counted in."""
    svg: str | None = None
    """Draw the schedule into this file."""
    rank: int | None = None
    """Print this rank's rounds too: what it computes, receives and sends."""

    @property
    def element_size(self) -> int:
        """Bytes of one element."""
        return _ELEMENT_SIZES[self.dtype]


def parse(argv: Sequence[str]) -> Options:
    """Reads a command line, without the program's name.

    Raises:
        ConfigError: a flag or a value that can not be honoured.
        SystemExit: with code 0, after ``--help`` is printed.
    """
    return read_options(argv, Options, program=PROGRAM, description=_DESCRIPTION)


def run(options: Options, console: Console | None = None) -> None:
    """Prints the schedule, and draws it where asked to.

    Raises:
        ConfigError: the flags do not fit together.
    """
    out = console or Console()
    if not out.is_terminal:
        out = Console(width=240, file=out.file)  # a file has no edge to fold lines at
    schedule = make_schedule(options)
    rank = options.rank
    if rank is not None and not 0 <= rank < schedule.layout.cp_size:
        last = schedule.layout.cp_size - 1
        raise ConfigError("--rank", rank, "is no rank of --context-parallel-size", f"0 to {last}")
    if options.svg is not None:
        _draw(schedule, options.svg)
    print_schedule(
        schedule,
        out,
        head_dim=options.head_dim,
        v_head_dim=options.v_head_dim,
        element_size=options.element_size,
    )
    if rank is not None:
        print_rank(schedule, rank, out)
    if options.svg is not None:
        out.print(f"\npicture   {options.svg}", highlight=False, markup=False)


def make_schedule(options: Options) -> Schedule:
    """The schedule the flags describe.

    Raises:
        ConfigError: the flags do not fit together.
    """
    mask = make_mask(options)
    layout = SequenceLayout.make(mask, options.context_parallel_size, options.cp_layout)
    return Schedule.build(
        mask,
        layout,
        exchange=options.cp_comm_type,
        route=options.cp_route,
        num_heads=options.num_attention_heads,
        num_kv_heads=options.num_query_groups,
        hierarchical_sizes=options.hierarchical_context_parallel_sizes,
        head_dim=options.head_dim,
        v_head_dim=options.v_head_dim,
    )


def make_mask(options: Options) -> Mask:
    """The mask the flags describe.

    Raises:
        ConfigError: two flags contradict each other, or lengths do not add up to the row.
    """
    has_documents = options.documents is not None or options.documents_random is not None
    kind = options.mask or ("documents" if has_documents else "causal")
    works = "--documents L1 L2 ... or --documents-random SEED"
    if kind == "documents" and not has_documents:
        raise ConfigError("--mask", kind, "needs the documents' lengths", works)
    if kind != "documents" and has_documents:
        raise ConfigError("--mask", kind, "has no documents", "--mask documents")
    if kind == "causal" and options.bidirectional:
        raise ConfigError("--bidirectional", "", "contradicts a causal mask", "--mask full")
    if options.documents is not None and options.documents_random is not None:
        raise ConfigError("--documents-random", options.documents_random, "is one of two", works)
    seq_len = 8192 if options.seq_length is None else options.seq_length
    window = options.window
    if kind == "causal":
        return Mask.causal(seq_len, window)
    if kind == "full":
        return Mask.full(seq_len, window)
    if options.documents is not None:
        lengths = _given_lengths(options.documents, options.seq_length)
    else:
        assert options.documents_random is not None
        lengths = random_lengths(seq_len, options.documents_random)
    return Mask.documents(lengths, not options.bidirectional, window)


def random_lengths(seq_len: int, seed: int) -> list[int]:
    """Log-normal document lengths that fill a row, the last one cut."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    left = seq_len
    while left:
        drawn = int(generator.lognormal(math.log(MEDIAN_LENGTH), SIGMA))
        lengths.append(min(max(drawn, 1), left))
        left -= lengths[-1]
    return lengths


def _given_lengths(documents: tuple[int, ...], seq_length: int | None) -> list[int]:
    total = sum(documents)
    if seq_length not in (None, total):
        rule = f"the documents add up to {total}"
        raise ConfigError("--seq-length", seq_length, rule, f"{total}, or leave it out")
    return list(documents)


def _draw(schedule: Schedule, path: str) -> None:
    try:
        schedule.plot(path)
    except OSError as error:
        near = (
            "" if Path(path).parent.is_dir() else f"a folder that exists, not {Path(path).parent}"
        )
        reason = error.strerror or str(error)
        raise ConfigError("--svg", path, f"can not be written: {reason}", near) from None
