"""Tries on one process whether a model, cut into the shards of two ranks, stays the same model.

The model runs on a whole row first, and every operation of the engine (attention, a recurrence, a
short convolution) writes down its inputs and its output. Then the model runs on each of two
pretended ranks' tokens, where the output that was written down stands in for what ranks would
compute together. If every operation's own inputs are those of the whole row, the exchange would
have given the same, layer by layer; if they differ, something outside of these operations mixed
tokens, or numbered them. The whole row itself must equal its documents, each alone, computed by
transformers' own code; this sees scores that never reach the registered functions.

Shapes: B = 1 batch, S tokens of the whole row, N = 2 ranks, H query heads, G key/value heads, D
head dim, E value head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.model.huggingface.batch_plan import IGNORED_LABEL, BatchPlan, shard_batch
from cp_megatron.model.huggingface.keyword_hooks import hand_down, tell_base
from cp_megatron.model.huggingface.shrink_config import NUM_ORDINARY_TOKENS
from cp_megatron.plan import SequenceLayout

_NUM_RANKS = 2
_ONE_DOCUMENT = (24,)
_PACKED = (5, 1, 9, 3, 6)
_FIRST_TOKEN = 5  # lower ids are padding and other special tokens in many vocabularies
# Relative errors. Wrong models are wrong by more than 1e-3; eager attention and losses round to
# float32 even in a float64 model.
_TOLERANCE: Mapping[torch.dtype, float] = {torch.float64: 1e-5, torch.float32: 1e-3}

# The attentions of transformers. The first one that runs is the reference; models with sinks or a
# softcap have no sdpa.
_OWN = ("sdpa", "eager")
_NOISE = 0.05

# Clauses that complete "the model ...".
_ATTENDS_ITSELF = "never calls the registered attention: it computes its own, in {}"
_HAS_STATES = "never calls the registered attention: it has none, and carries states between tokens"
_POOLS = "returns no entry per token: it pools the tokens of one rank"
_OTHER_SCORES = (
    "attends otherwise than the registered attention does: it adds to scores, masks or tokens "
    "outside of it"
)
_BEGINS = "begins its positions at another number than 0, which shard_batch begins them at"
DROPS_KEYWORDS = "does not pass keyword arguments on to its attention"
_NUMBERS = (
    "numbers the tokens of each rank from 0 and never reads position_ids, or carries a state "
    "from token to token"
)
_DOCUMENTS = "computes packed documents otherwise than each alone"
_MIXES = "mixes the tokens of one rank outside of attention, by a state, a convolution or a mean"
_LEAKS = "lets a token be seen by others than those after it in its document"
_LOSS = "computes a loss that is not the sum over tokens divided by num_items_in_batch"

Build = Callable[[str], Any]


class Untried(Exception):  # noqa: N818 (reads as what happened)
    """The probe could not be made: the model does not run on a short row of tokens alone."""


@dataclass(frozen=True)
class Finding:
    """What the probe saw.

    Attributes:
        fault: what the model does, as a clause, if its logits cannot be sharded; otherwise empty.
        loss_fault: the same for the loss that it computes from labels.
        hands_down: whether the model needs the hooks of ``hand_down``.
    """

    fault: str = ""
    loss_fault: str = ""
    hands_down: bool = False


@dataclass(frozen=True, kw_only=True)
class ProbePlan(BatchPlan):
    """Takes the place of a batch's plan: attention over keys that were written down.

    Attributes:
        places: int64 [S / N], the positions of the tokens that the model is given; None is all.
        calls: the inputs and the output of each operation on the whole row.
        errors: the largest relative error of the inputs of each operation so far.
    """

    places: Tensor | None = None
    calls: list[tuple[tuple[Tensor, ...], Tensor]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def within(self, window: int | None) -> Any:
        return _Recorded(self, super().within(window))


@dataclass(frozen=True)
class _Recorded:
    plan: ProbePlan
    cp: ContextParallel

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **options: Any
    ) -> Any:
        """Takes the arguments of ``ContextParallel.attention``."""
        attend = partial(self.cp.attention, scale=scale, **options)
        return self._run(attend, (q, k, v), (*q.shape[:3], v.shape[3]))

    def linear_attention(self, *given: Tensor, scale: float | None = None, kept: Any = None) -> Any:
        """Takes the arguments of ``ContextParallel.linear_attention``; given are at most five."""
        return self._run(partial(self.cp.linear_attention, scale=scale), given, given[2].shape)

    def short_conv(self, x: Tensor, *weights: Any) -> Any:
        """Takes the arguments of ``ContextParallel.short_conv``."""
        return self._run(lambda x: self.cp.short_conv(x, *weights), (x,), x.shape)

    def _run(
        self, compute: Callable[..., Any], given: tuple[Tensor, ...], shape: tuple[int, ...]
    ) -> Any:
        """Computes the whole row; or for a shard, looks up what was computed.

        Args:
            compute: gives the output, of ``shape``.
            given: its inputs; dim 1 of each and of the output are the tokens.
        """
        plan, call = self.plan, len(self.plan.errors)
        places = plan.places
        if places is None:
            out = compute(*given)
            plan.calls.append((given, out))
            plan.errors.append(0.0)
            return out
        if call == len(plan.calls):
            plan.errors.append(float("inf"))  # more operations than the whole row had
            return given[0].new_zeros(shape)
        known, out = plan.calls[call]
        pairs = zip(given, known, strict=True) if len(given) == len(known) else ()
        errors = [error_of(x, y[:, places]) for x, y in pairs]
        plan.errors.append(max(errors, default=float("inf")))
        return out[:, places]


def error_of(found: Tensor, expected: Tensor) -> float:
    """The relative error in the norm of a tensor; infinite if shapes differ or a value is none."""
    if found.shape != expected.shape:
        return float("inf")
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if math.isfinite(error) else float("inf")


def try_sharding(build: Build, attention: str) -> Finding:
    """Runs the model whole and in shards, on one document and on packed ones.

    ``forward`` is called directly, so that hooks of the model (which may shard rows) stay out.

    Args:
        build: gives the model with an attention implementation.
        attention: the name under which the engine's attention is registered.

    Raises:
        Untried: the model does not run on tokens alone, by transformers' own attention.
        ConfigError: the model asks the engine for something that is not supported.
    """
    problem: Exception | None = None
    for dtype, name in product(_TOLERANCE, _OWN):
        with _quiet_cpu():
            try:
                own = _own_attention(build, name, dtype)
                _documents_alone(own, _row(_ONE_DOCUMENT))
            except Exception as error:  # whatever a model of any kind may raise
                problem = error
                continue
            model = build(attention)
            model.load_state_dict(own.state_dict())
            probe = _Probe(own, model.to(dtype).eval(), _TOLERANCE[dtype])
            finding = probe.find()
            if finding.fault in (DROPS_KEYWORDS, probe.own_mixing()):
                hand_down(model)
                finding = replace(probe.find(), hands_down=True)
            return finding
    raise Untried(f"{type(problem).__name__}: {problem}") from problem


@contextmanager
def _quiet_cpu() -> Iterator[None]:
    """On the CPU, without gradients or autocast; the random numbers of the caller stay."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also reset the GPUs
        yield


def _own_attention(build: Build, name: str, dtype: torch.dtype) -> Any:
    """The model with transformers' attention. Its weights get noise, since some begin as zeros."""
    model = build(name)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(_NOISE * noise.to(parameter.dtype))
    return model.to(dtype).eval()


def _row(lengths: tuple[int, ...]) -> dict[str, Any]:
    """input_ids, position_ids and labels [1, S]; no document's first token is a target."""
    shape, generator = (1, sum(lengths)), torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(_FIRST_TOKEN, NUM_ORDINARY_TOKENS, shape, generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = torch.where(positions == 0, IGNORED_LABEL, ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def _main_output(out: Any) -> Tensor:
    """The logits, the last hidden states, or whatever tensor comes first."""
    if isinstance(out, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(out.get(name), Tensor):
                return cast(Tensor, out[name])
    values = out.values() if isinstance(out, Mapping) else out
    return next(value for value in values if isinstance(value, Tensor))


def _documents_alone(model: Any, row: Mapping[str, Tensor]) -> list[Tensor]:
    """The output of each document by itself, numbered as the model numbers it."""
    starts = torch.nonzero(row["position_ids"][0] == 0).flatten().tolist()
    ends = [*starts[1:], row["input_ids"].shape[1]]
    pieces = (row["input_ids"][:, a:b] for a, b in zip(starts, ends, strict=True))
    return [_main_output(model.forward(input_ids=piece)) for piece in pieces]


@dataclass(frozen=True)
class _Probe:
    own: Any
    model: Any
    tolerance: float

    def find(self) -> Finding:
        for lengths in (_ONE_DOCUMENT, _PACKED):
            fault = self._fault_of(_row(lengths))
            if fault:
                return Finding(fault)
        return Finding(loss_fault=self._loss_fault(_row(_ONE_DOCUMENT)))

    def _fault_of(self, row: dict[str, Any]) -> str:
        batch = _without_labels(shard_batch(None, **row))
        plan = _recording(batch)
        try:
            whole = self._output(batch, plan)
        except ConfigError as error:
            if error.flag != "context_parallel":
                raise
            return DROPS_KEYWORDS
        if not plan.calls:
            return self.own_mixing()
        alone = _documents_alone(self.own, row)
        if whole.shape[:2] != row["input_ids"].shape or whole.ndim < 3:
            return _POOLS
        packed = len(alone) > 1
        if not self._equal(whole, torch.cat(alone, 1)):
            given = self.own.forward(input_ids=row["input_ids"], position_ids=row["position_ids"])
            if not packed and self._equal(whole, _main_output(given)):
                return _BEGINS
            return self._numbering(batch) or (_DOCUMENTS if packed else _OTHER_SCORES)
        for rank in range(_NUM_RANKS):
            shard, own_plan = _shard(batch, plan, rank)
            out = self._output(shard, own_plan)
            places = own_plan.places
            exact = len(own_plan.errors) == len(plan.calls) and max(own_plan.errors)
            if exact > self.tolerance or not self._equal(out, whole[:, places]):
                return self._numbering(batch) or _MIXES
        return self._leak(batch, whole)

    def own_mixing(self) -> str:
        """What is wrong with a model that calls no operation of the engine."""
        names = sorted({type(module).__name__ for module in self.model.modules()})
        found = [name for name in names if "Attention" in name]
        return _ATTENDS_ITSELF.format(", ".join(found)) if found else _HAS_STATES

    def _output(self, batch: Mapping[str, Any], plan: ProbePlan) -> Tensor:
        tell_base(self.model, plan)
        return _main_output(self.model.forward(**{**batch, "context_parallel": plan}))

    def _equal(self, found: Tensor, expected: Tensor) -> bool:
        return error_of(found, expected) < self.tolerance

    def _numbering(self, batch: Mapping[str, Any]) -> str:
        """Says so if other position_ids change nothing."""
        other = {**batch, "position_ids": batch["position_ids"] * 2 + 1}
        outs = [self._output(given, _recording(batch)) for given in (batch, other)]
        return _NUMBERS if self._equal(outs[1], outs[0]) else ""

    def _leak(self, batch: Mapping[str, Any], whole: Tensor) -> str:
        """A changed token must change what follows it in its document, and nothing else."""
        mask = batch["context_parallel"].cp.mask
        document = max(range(len(mask.lengths)), key=mask.lengths.__getitem__)
        start, end = mask.starts[document : document + 2]
        place = (start + end) // 2
        ids = batch["input_ids"].clone()
        ids[:, place] = _FIRST_TOKEN + (ids[:, place] + 1) % (NUM_ORDINARY_TOKENS - _FIRST_TOKEN)
        out = self._output({**batch, "input_ids": ids}, _recording(batch))
        # [1, S, ...] -> [S]
        seen = (out - whole).flatten(2).norm(dim=2)[0] > self.tolerance * 1e-3 * whole.norm()
        others = torch.cat([seen[:place], seen[end:]])
        return _LEAKS if others.any() or not seen[place : place + 2].all() else ""

    def _loss_fault(self, row: dict[str, Any]) -> str:
        """Compares the ranks' losses with the loss of the whole row."""
        counted = (row["labels"][:, 1:] != IGNORED_LABEL).sum()
        batch = shard_batch(None, **row)
        plan = _recording(batch)
        self._output(_without_labels(batch), plan)
        try:
            expected = self.own.forward(**row, num_items_in_batch=counted).get("loss")
            if expected is None:
                return ""
            shards = [_shard(batch, plan, rank) for rank in range(_NUM_RANKS)]
            losses = []
            for shard, own_plan in shards:
                tell_base(self.model, own_plan)
                losses.append(self.model.forward(**{**shard, "context_parallel": own_plan}).loss)
        except Exception as error:  # whatever a model of any kind may raise
            return f"{_LOSS}; it fails on labels per token ({type(error).__name__}: {error})"
        return "" if error_of(sum(losses), expected) < _TOLERANCE[torch.float32] else _LOSS


def _without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    names = ("labels", "shift_labels", "num_items_in_batch")
    return {name: value for name, value in batch.items() if name not in names}


def _recording(batch: Mapping[str, Any], **kwargs: Any) -> ProbePlan:
    plan = batch["context_parallel"]
    return ProbePlan(cp=plan.cp, longest=plan.longest, **kwargs)


def _shard(
    batch: Mapping[str, Any], whole: ProbePlan, rank: int
) -> tuple[dict[str, Any], ProbePlan]:
    """The tokens of one of two ranks, in zigzag, which holds two pieces of the row."""
    layout = SequenceLayout.make(whole.cp.mask, _NUM_RANKS, "zigzag")
    places = torch.from_numpy(layout.positions(rank))
    shard = {
        name: value[:, places] if isinstance(value, Tensor) and value.ndim > 1 else value
        for name, value in batch.items()
    }
    return shard, _recording(batch, places=places, calls=whole.calls)
