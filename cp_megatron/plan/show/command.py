"""The command line of ``python -m cp_megatron.plan``: its flags, and the schedule they describe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from rich.console import Console

from cp_megatron.config.schema.parallel_config import Exchange, LatentExchange, LayoutKind, Route
from cp_megatron.config.schema.ranges import Range
from cp_megatron.config.words import read_options, split_words
from cp_megatron.errors import ConfigError
from cp_megatron.plan.halo import Halo, plan_halos
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.pipeline import PipelinePlan
from cp_megatron.plan.pipeline_timeline import PipelineTimeline
from cp_megatron.plan.schedule import Schedule
from cp_megatron.plan.show.pipeline_plot import write_pipeline_svg
from cp_megatron.plan.show.pipeline_text import print_pipeline
from cp_megatron.plan.show.states_plot import write_states_svg
from cp_megatron.plan.show.states_text import print_states
from cp_megatron.plan.show.text import print_rank, print_schedule
from cp_megatron.plan.states import StatePlan, StateSize, Transition

PROGRAM = "python -m cp_megatron.plan"
MEDIAN_LENGTH, SIGMA = 3000, 1.5
AtLeastOne = Annotated[int, Range(1)]
WindowEnd = Annotated[int, Range(-1)]
_DESCRIPTION = f"""Print and draw a schedule: which rank holds which tokens, computes which tiles
of the attention matrix in which round, and sends what to whom. It needs neither a GPU nor torch.
With --pipeline-model-parallel-size, the schedule is that of a pipeline: which stage makes which
pass when.

{PROGRAM} --mask documents --documents 900 100 3000 96 --context-parallel-size 4 --svg plan.svg
{PROGRAM} --pipeline-model-parallel-size 4 --num-microbatches 8 --svg pipeline.svg"""

PIPELINE = "--pipeline-model-parallel-size"
_PIPELINE_FLAGS = (PIPELINE, "--num-microbatches", "--num-virtual-stages-per-pipeline-rank")

ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float32": 4, "float64": 8})
"""Bytes of a number of each type."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The schedule to show."""

    mask: Literal["causal", "full", "documents"] | None = None
    """The mask; by default documents if --documents or --documents-random is given, else causal."""
    seq_length: AtLeastOne | None = None
    """Tokens of the row; by default the sum of --documents, or 8,192."""
    documents: tuple[AtLeastOne, ...] | None = None
    """The lengths of the packed documents."""
    documents_random: Annotated[int, Range(0)] | None = None
    """A seed for log-normal document lengths of median 3,000 and sigma 1.5 that fill the row."""
    bidirectional: bool = False
    """Attend documents in both directions; --mask full always does."""
    window: tuple[WindowEnd, WindowEnd] | None = None
    """LEFT RIGHT: query q attends keys q - LEFT to q + RIGHT; -1 is unlimited. A causal mask ends
    at q."""
    context_parallel_size: AtLeastOne = 4
    """Ranks that share the row."""
    cp_layout: LayoutKind = "auto"
    """Which rank holds which part of the row."""
    cp_comm_type: Exchange = "auto"
    """How keys and values reach the queries; auto chooses what ranks wait for least."""
    cp_route: Route = "auto"
    """Route of p2p: from neighbour to neighbour, or straight from the owner."""
    hierarchical_context_parallel_sizes: tuple[int, int] | None = None
    """Two sizes A P for a2a+p2p or auto. A neighbours exchange heads, and P groups of neighbours
    send keys to each other; A x P must be the context parallel size."""
    num_attention_heads: AtLeastOne = 32
    """Query heads."""
    num_query_groups: AtLeastOne | None = None
    """Key/value heads; by default 8, and with --latent as many as query heads."""
    head_dim: AtLeastOne = 128
    """Width of a query and key head."""
    v_head_dim: AtLeastOne | None = None
    """Width of a value head; by default that of a key head."""
    latent: tuple[AtLeastOne, AtLeastOne] | None = None
    """Two widths L R. All heads are expanded from a latent of width L and a rotary key of width R,
    which is a part of --head-dim; DeepSeek has 512 64, with --head-dim 192 --v-head-dim 128."""
    cp_latent_exchange: LatentExchange = "auto"
    """What p2p and all_gather send with --latent: latents (latent), or keys and values (expanded).
    The choice auto sends whichever takes fewer bytes."""
    linear_num_value_heads: AtLeastOne | None = None
    """The number of value heads of a linear recurrence. If it is given, the plan of the states is
    printed as well."""
    linear_key_head_dim: AtLeastOne | None = None
    """Width of the recurrence's query and key heads, by default 128."""
    linear_value_head_dim: AtLeastOne | None = None
    """Width of the recurrence's value heads, by default 128."""
    linear_transition: Transition | None = None
    """How the recurrence changes a state: by a matrix (gated DeltaNet, KDA; the default), by a
    vector of decays (GLA) or by a single decay (Mamba-2, scalar)."""
    linear_conv_kernel_dim: AtLeastOne | None = None
    """Number of tokens that the recurrence's convolution reads, itself included, by default 4."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """The type in which bytes are counted."""
    pipeline_model_parallel_size: AtLeastOne | None = None
    """Stages of a pipeline, whose schedule is shown instead of that of attention."""
    num_microbatches: AtLeastOne | None = None
    """Micro batches of a step of the pipeline, by default twice as many as stages."""
    num_virtual_stages_per_pipeline_rank: AtLeastOne | None = None
    """Chunks of the model that each stage has, by default 1. With several, passes are
    interleaved."""
    svg: str | None = None
    """Draw the schedule to this file, and the states of a recurrence to another one, whose name
    ends in -states.svg."""
    rank: int | None = None
    """Also print the rounds of this rank: what it computes, receives and sends."""


def parse(argv: Sequence[str]) -> PlanOptions:
    """Reads a command line, without the program's name.

    Raises:
        ConfigError: a flag or a value is invalid, or describes what is not shown.
        SystemExit: with code 0, after ``--help`` is printed.
    """
    options = read_options(argv, PlanOptions, program=PROGRAM, description=_DESCRIPTION)
    shows_pipeline = options.pipeline_model_parallel_size is not None
    for flag, words in split_words(argv):
        is_for_pipeline = flag in _PIPELINE_FLAGS
        if is_for_pipeline and not shows_pipeline:
            raise ConfigError(flag, " ".join(words), "is of a pipeline", f"{PIPELINE} 4 with it")
        if shows_pipeline and not is_for_pipeline and flag != "--svg":
            rule = f"is of attention, and {PIPELINE} shows a pipeline instead"
            raise ConfigError(flag, " ".join(words), rule, f"one of the two: {flag} or {PIPELINE}")
    return options


def run(options: PlanOptions, console: Console | None = None) -> None:
    """Prints the schedule, and draws it if requested.

    Raises:
        ConfigError: two flags contradict each other, or the lengths do not add up to the row.
    """
    out = console or Console()
    if not out.is_terminal:
        out = Console(width=240, file=out.file)  # lines are not folded in a file
    if options.pipeline_model_parallel_size is not None:
        _show_pipeline(options, options.pipeline_model_parallel_size, out)
        return
    schedule = make_schedule(options)
    states = make_states(options, schedule)
    rank, size = options.rank, schedule.layout.cp_size
    if rank is not None and not 0 <= rank < size:
        rule = "is not a rank of --context-parallel-size"
        raise ConfigError("--rank", rank, rule, f"0 to {size - 1}")
    pictures = _draw(schedule, states, options.svg) if options.svg is not None else []
    widths = options.head_dim, ELEMENT_BYTES[options.dtype], options.v_head_dim
    moved = [schedule.bytes_received(r, *widths) for r in range(size)]
    print_schedule(schedule, out, moved)
    if rank is not None:
        print_rank(schedule, rank, out)
    if states is not None:
        print_states(*states, out)
    _print_paths(pictures, out)


def _show_pipeline(options: PlanOptions, num_stages: int, out: Console) -> None:
    """Prints a pipeline, and draws it if requested."""
    number = options.num_microbatches or 2 * num_stages
    plan = PipelinePlan(num_stages, number, options.num_virtual_stages_per_pipeline_rank or 1)
    timeline, path = PipelineTimeline.simulate(plan), options.svg
    if path is not None:
        with _writing(path):
            write_pipeline_svg(timeline, path)
    print_pipeline(timeline, out)
    _print_paths([path] if path is not None else [], out)


def _print_paths(pictures: Sequence[str], out: Console) -> None:
    if pictures:
        out.print()
    for path in pictures:
        out.print(f"picture   {path}", highlight=False, markup=False)


def make_states(
    options: PlanOptions, schedule: Schedule
) -> tuple[StatePlan, StateSize, tuple[Halo, ...]] | None:
    """Plans the states of the recurrence that the flags describe; None if there is none.

    The layout is that of the schedule. A window is one of attention.

    Raises:
        ConfigError: the mask is not causal, or a recurrence is described that has no heads.
    """
    key_dim, value_dim = options.linear_key_head_dim, options.linear_value_head_dim
    transition, width = options.linear_transition, options.linear_conv_kernel_dim
    if options.linear_num_value_heads is None:
        for flag, value in (
            ("--linear-key-head-dim", key_dim),
            ("--linear-value-head-dim", value_dim),
            ("--linear-transition", transition),
            ("--linear-conv-kernel-dim", width),
        ):
            if value is not None:
                works = "--linear-num-value-heads 32 with it"
                raise ConfigError(flag, value, "describes a recurrence without heads", works)
        return None
    mask, layout = schedule.mask.within(None), schedule.layout
    plan = StatePlan.of(mask, layout, options.linear_num_value_heads)
    element = max(4, ELEMENT_BYTES[options.dtype])
    size = StateSize.of(key_dim or 128, value_dim or 128, transition or "matrix", element)
    return plan, size, plan_halos(mask, layout, plan, width or 4)


def make_schedule(options: PlanOptions) -> Schedule:
    """Builds the schedule that the flags describe; see ``run`` for the errors."""
    mask = make_mask(options)
    layout = SequenceLayout.make(mask, options.context_parallel_size, options.cp_layout)
    return Schedule.build(
        *(mask, layout, options.cp_comm_type, options.cp_route),
        *_heads(options),
        options.hierarchical_context_parallel_sizes,
        head_dim=options.head_dim,
        v_head_dim=options.v_head_dim,
        latent=options.latent,
        exchange_latent=options.cp_latent_exchange,
    )


def _heads(options: PlanOptions) -> tuple[int, int]:
    """The numbers of query heads and of key/value heads, with the default filled in."""
    heads, kv_heads = options.num_attention_heads, options.num_query_groups
    if kv_heads is None:
        return heads, 8 if options.latent is None else heads
    if options.latent is not None and kv_heads != heads:
        rule = f"must be --num-attention-heads {heads} with --latent: each query head has own keys"
        raise ConfigError("--num-query-groups", kv_heads, rule, str(heads))
    return heads, kv_heads


def make_mask(options: PlanOptions) -> Mask:
    """Builds the mask that the flags describe; see ``run`` for the errors."""
    has_documents = options.documents is not None or options.documents_random is not None
    kind = options.mask or ("documents" if has_documents else "causal")
    works = "--documents L1 L2 ... or --documents-random SEED"
    if kind == "documents" and not has_documents:
        raise ConfigError("--mask", kind, "needs the lengths of the documents", works)
    if kind != "documents" and has_documents:
        raise ConfigError("--mask", kind, "has no documents", "--mask documents")
    if kind == "causal" and options.bidirectional:
        raise ConfigError("--bidirectional", "", "contradicts a causal mask", "--mask full")
    if options.documents is not None and options.documents_random is not None:
        rule = "cannot be combined with --documents"
        raise ConfigError("--documents-random", options.documents_random, rule, works)
    seq_len = 8192 if options.seq_length is None else options.seq_length
    window = options.window
    if kind == "causal":
        return Mask.causal(seq_len, window)
    if kind == "full":
        return Mask.full(seq_len, window)
    if options.documents is None:
        assert options.documents_random is not None
        lengths: Sequence[int] = random_lengths(seq_len, options.documents_random)
    else:
        lengths, total = options.documents, sum(options.documents)
        if options.seq_length not in (None, total):
            rule = f"the documents add up to {total}"
            raise ConfigError("--seq-length", seq_len, rule, f"{total}, or leave it out")
    return Mask.documents(lengths, not options.bidirectional, window)


def random_lengths(seq_len: int, seed: int) -> list[int]:
    """Draws log-normal document lengths that fill a row; the last one is cut."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    left = seq_len
    while left:
        drawn = int(generator.lognormal(math.log(MEDIAN_LENGTH), SIGMA))
        lengths.append(min(max(drawn, 1), left))
        left -= lengths[-1]
    return lengths


def _draw(
    schedule: Schedule, states: tuple[StatePlan, StateSize, tuple[Halo, ...]] | None, path: str
) -> list[str]:
    """Writes the pictures and returns their paths."""
    paths = [path]
    with _writing(path):
        schedule.plot(path)
        if states is not None:
            paths.append(str(Path(path).with_suffix("")) + "-states.svg")
            mask = schedule.mask.within(None)
            write_states_svg(states[0], mask, schedule.layout, states[1], paths[1])
    return paths


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """Reports a picture that cannot be written."""
    try:
        yield
    except OSError as error:
        folder = Path(path).parent
        near = "" if folder.is_dir() else f"a folder that exists, not {folder}"
        rule = f"cannot be written: {error.strerror or error}"
        raise ConfigError("--svg", path, rule, near) from None
