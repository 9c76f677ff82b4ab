"""What a rank will hold, kind by kind, by arithmetic; no torch, no tensor.

Bytes are counted from the configuration, the grid and the types alone: of parameters, gradients and
the optimizer's state for good, of activations at the end of the forward pass of one micro batch,
when most of them are there. What autograd keeps of an operation is a fact of torch, so a test holds
this page against what ``memory_meter.py`` finds.

    residual stream x --> norm -----> q, k, v --> attention --> out --> + --> norm --> MLP --> +
                          keeps x,    norm's      q, k, v,      out           as       the wide
                          statistics  result      out, lse                    above    tensors

Each tensor is counted once, for the first that keeps it. Sizes of the CPU are measured; where CUDA
keeps something else (norms, dropout), they follow torch's sources.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cp_megatron.config import MemoryConfig, ModelConfig, tokens_with_logits
from cp_megatron.memory.exchange_buffers import (
    Operands,
    Rooms,
    lay_backward,
    lay_forward,
    schedules,
)
from cp_megatron.plan import Schedule
from cp_megatron.plan.heads import HeadExchange
from cp_megatron.plan.tiles import own_tiles, pack
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.sequence import local_heads
from cp_megatron.spec.parameter_table import parameters, parameters_on_rank

ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2})

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
GATHERED = "gathered weights"
ACTIVATIONS, HOST = "activations", "on the host"
LOGITS, EXCHANGE = "logits", "exchange buffers"
AFTER_FORWARD, PEAK = "held after forward", "peak of the step"

EMBEDDING, DROPOUT, INPUTS = "embedding", "dropout masks", "layer inputs"
ATTENTION_NORM, ATTENTION = "attention norm", "attention"
MLP_NORM, MLP = "MLP norm", "MLP"
FINAL_NORM, LOSS, OTHER = "final norm", "loss", "other"
MODULES = (
    *(EMBEDDING, DROPOUT, INPUTS, ATTENTION_NORM, ATTENTION),
    *(MLP_NORM, MLP, FINAL_NORM, LOSS, OTHER),
)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one kind on one rank.

    Attributes:
        kind: what: ``parameters``, ``gradients`` and ``optimizer`` are there for good;
            ``gathered weights`` are whole ones at the end of forward, where FSDP2 has let the
            layers' go and keeps those outside of them; ``activations`` are kept for the backward
            of one micro batch; ``logits`` and ``exchange buffers`` are the most at one time.
        detail: the module of activations, over all layers; ``on the host`` where parameters and
            what belongs to them are kept there.
        num_bytes: how much.
    """

    kind: str
    detail: str = ""
    num_bytes: int


def predict(plan: RunPlan, rank: int) -> tuple[Held, ...]:
    """What ``rank`` will hold in the first step.

    Args:
        plan: the run, on its device.
        rank: of the whole world.

    Returns:
        One entry per kind and detail, zeros included, in the order of a report. The peak of a step
        is not predicted: it depends on what operations allocate inside. Where every batch has
        documents of its own, exchange buffers are those of rows that are one document.
    """
    return predict_ranks(plan, [rank])[0]


def predict_ranks(plan: RunPlan, ranks: Iterable[int]) -> list[tuple[Held, ...]]:
    """The same of several ranks; what they share is worked out once."""
    found = schedules(plan)
    rooms: dict[int, tuple[int, int]] = {}
    predicted = []
    for rank in ranks:
        sizes, cp_rank = _Sizes.of(plan, rank, found), plan.grid.coordinates(rank).cp
        if cp_rank not in rooms:
            rooms[cp_rank] = _room_bytes(found, cp_rank, sizes.operands)
        predicted.append(tuple(_held(plan, rank, sizes, *rooms[cp_rank])))
    return predicted


def _held(
    plan: RunPlan, rank: int, sizes: _Sizes, rooms_in_forward: int, rooms: int
) -> Iterator[Held]:
    """Everything, in order."""
    kept, on_host = sizes.kept(), 0
    if plan.config.memory.cpu_offloading:
        on_host = kept.pop(INPUTS, 0)
    stored, gradients, optimizer = _permanent(plan, rank)
    yield from (stored, gradients, optimizer)
    gathered = _gathered_bytes(plan)
    yield Held(kind=GATHERED, num_bytes=gathered)
    for name in MODULES:
        yield Held(kind=ACTIVATIONS, detail=name, num_bytes=kept[name])
    yield Held(kind=HOST, detail=INPUTS, num_bytes=on_host)
    yield Held(kind=LOGITS, num_bytes=sizes.logits())
    yield Held(kind=EXCHANGE, num_bytes=rooms)
    total = gathered + kept.total() + rooms_in_forward
    if stored.detail != HOST:
        # The optimizer has no state before the first step, unless it was loaded.
        total += stored.num_bytes + (optimizer.num_bytes if plan.load else 0)
    yield Held(kind=AFTER_FORWARD, num_bytes=total)


def _room_bytes(found: Iterable[Schedule], cp_rank: int, operands: Operands) -> tuple[int, int]:
    """Bytes for messages once the layers' forward has run, and once their backward has."""
    rooms = Rooms()
    for schedule in found:
        lay_forward(rooms, schedule, cp_rank, operands)
    in_forward = rooms.num_bytes
    for schedule in found:
        lay_backward(rooms, schedule, cp_rank, operands)
    return in_forward, rooms.num_bytes


def _permanent(plan: RunPlan, rank: int) -> tuple[Held, Held, Held]:
    """Parameters, gradients, and of AdamW two moments and a step per parameter."""
    shape = {"vocab_size": plan.padded_vocab_size, "seq_length": plan.config.data.seq_length}
    model, grid = plan.config.model, plan.grid
    number = parameters_on_rank(model, **shape, grid=grid, rank=rank)
    num_bytes = number * ELEMENT_BYTES["float64" if plan.dtype == "float64" else "float32"]
    steps = 4 * sum(row.copies for row in parameters(model, **shape, tp=grid.tp))
    moved = plan.config.memory.optimizer_cpu_offload and plan.device == "cuda"
    detail = HOST if moved else ""
    return (
        Held(kind=PARAMETERS, detail=detail, num_bytes=num_bytes),
        Held(kind=GRADIENTS, detail=detail, num_bytes=num_bytes),
        Held(kind=OPTIMIZER, detail=detail, num_bytes=2 * num_bytes + steps),
    )


def _gathered_bytes(plan: RunPlan) -> int:
    """Whole weights at the end of forward, in the compute type, padded to equal shards."""
    assert plan.dtype is not None
    shape = {"vocab_size": plan.padded_vocab_size, "seq_length": plan.config.data.seq_length}
    model, grid = plan.config.model, plan.grid
    ranks, element = grid.size("dp_cp"), ELEMENT_BYTES[plan.dtype]
    outside = ("embedding", "positions", "final norm", "final norm bias", "head")
    total = 0
    for row in parameters(model, **shape, tp=grid.tp):
        if row.name in outside:
            first, *rest = row.shape
            first //= grid.tp if row.tp_dim == 0 else 1
            total += -(-first // ranks) * ranks * math.prod(rest)
    return total * element


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The numbers that activations are products of.

    Attributes:
        model, memory: of the run.
        operands: of attention; its ``num_tokens`` are those of this rank.
        stream: tokens of a row in the residual stream; fewer with sequence parallelism.
        gathered: tensor parallel ranks that share them.
        tp: tensor parallel size.
        vocabulary: logits of a token on this rank.
        on_cuda: the device.
        trade: of heads for tokens, where there is one.
        results: copies of attention's results that are kept.
    """

    model: ModelConfig
    memory: MemoryConfig
    operands: Operands
    stream: int
    gathered: int
    tp: int
    vocabulary: int
    on_cuda: bool
    trade: HeadExchange | None
    results: int

    @classmethod
    def of(cls, plan: RunPlan, rank: int, found: tuple[Schedule, ...]) -> _Sizes:
        """Those of a rank."""
        assert plan.dtype is not None
        model, tp, sequence = plan.config.model, plan.grid.tp, plan.sequence
        heads, kv_heads = local_heads(model, tp)
        element = ELEMENT_BYTES[plan.dtype]
        gathered = tp if plan.config.parallel.sequence_parallel else 1
        num_tokens = sequence.layout.shard_len
        cp_rank = plan.grid.coordinates(rank).cp
        trade = found[0].heads(cp_rank) if found else None
        return cls(
            model=model,
            memory=plan.config.memory,
            operands=Operands(
                # Rows whose documents are masked are one row.
                batch=1 if sequence.per_batch else plan.micro_batch_size,
                num_tokens=num_tokens,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=model.head_dim,
                element=element,
                exact=max(4, element),
            ),
            stream=num_tokens // gathered,
            gathered=gathered,
            tp=tp,
            vocabulary=plan.padded_vocab_size // tp,
            on_cuda=plan.device == "cuda",
            trade=trade,
            results=2 if trade is None and _is_transposed(plan, cp_rank) else 1,
        )

    def kept(self) -> Counter[str]:
        """Bytes by module of what backward reads; layers are summed up."""
        x, model = self.operands, self.model
        tokens, stream = x.batch * x.num_tokens, x.batch * self.stream
        kept: Counter[str] = Counter()
        # Ids; where the vocabulary is split also which of them are elsewhere.
        kept[EMBEDDING] = tokens * (8 if self.tp == 1 else 9)
        if model.position_embedding_type == "learned_absolute":
            kept[EMBEDDING] += 8 * x.num_tokens
        kept[DROPOUT] = self._dropout(stream)
        for layer in range(model.num_layers):
            kept.update(self._layer(self._granularity(layer)))
        self._add_rotation(kept)
        kept[FINAL_NORM] = self._norm(stream, model.hidden_size)
        # Gradients of x and of the head, the tokens' losses and their sum.
        kept[LOSS] = stream * model.hidden_size * x.element
        kept[LOSS] += self.vocabulary * model.hidden_size * x.exact + (tokens + 1) * x.exact
        return kept

    def logits(self) -> int:
        """Of one chunk, in the compute type and in the type they are summed in."""
        x = self.operands
        asked = tokens_with_logits(self.memory.loss_chunk_size, self.vocabulary)
        rows = min(self.stream, max(1, asked // (x.batch * self.gathered)))
        copies = x.exact if x.exact == x.element else x.exact + x.element
        return x.batch * rows * self.gathered * self.vocabulary * copies

    def _granularity(self, layer: int) -> str:
        number = self.memory.recompute_num_layers
        return self.memory.recompute_granularity if number is None or layer < number else "none"

    def _layer(self, granularity: str) -> Counter[str]:
        x, hidden = self.operands, self.model.hidden_size
        tokens, stream = x.batch * x.num_tokens, x.batch * self.stream
        one = stream * hidden * x.element
        if granularity == "full":
            return Counter({INPUTS: one})
        kept = Counter({ATTENTION: self._attended(), DROPOUT: 2 * self._dropout(stream)})
        if granularity == "selective":
            kept[INPUTS] = 2 * one
            return kept
        kept[ATTENTION_NORM] = kept[MLP_NORM] = self._norm(stream, hidden)
        # With the norm's result: what it is gathered to is forgotten.
        kept[ATTENTION] += one + self._head_norms(tokens)
        wide = 4 if self.model.swiglu else 2  # gate, silu(gate), up and their product
        ffn = self.model.ffn_size // self.tp
        kept[MLP] = one + tokens * wide * ffn * x.element
        if self.memory.mlp_tile_size is not None and not self._norm_keeps_input:
            kept[MLP] += one
        if self.trade is None:  # else those of other ranks' tokens are kept in their place
            kept[ATTENTION] += tokens * (x.heads + 2 * x.kv_heads) * x.head_dim * x.element
        return kept

    def _attended(self) -> int:
        """Attention's results, and where heads are traded what can not be computed again."""
        x, trade = self.operands, self.trade
        own = x.batch * x.num_tokens * x.heads
        result = own * x.head_dim * x.element
        if trade is None:
            return self.results * result + own * x.exact
        (q0, q1), (k0, k1) = trade.query_heads[trade.index], trade.kv_heads[trade.index]
        tokens = x.batch * x.num_tokens * len(trade.peers)
        mine = 2 * (q1 - q0) + 2 * (k1 - k0)  # q, k, v and out
        return result + tokens * (mine * x.head_dim * x.element + (q1 - q0) * x.exact)

    def _head_norms(self, tokens: int) -> int:
        if not self.model.qk_layernorm:
            return 0
        heads = self.operands.heads + self.operands.kv_heads
        return self._norm(tokens * heads, self.operands.head_dim)

    def _add_rotation(self, kept: Counter[str]) -> None:
        """Cosines and sines of all layers: kept by attention, or, where all of it is computed
        again, beside autograd."""
        x = self.operands
        if self.model.position_embedding_type != "rope":
            return
        layers = [self._granularity(layer) for layer in range(self.model.num_layers)]
        kept[ATTENTION if "none" in layers else OTHER] += x.num_tokens * x.head_dim * x.exact

    @property
    def _fused_norm(self) -> bool:
        """The CPU's RMSNorm is put together from operations."""
        return self.on_cuda or self.model.normalization == "LayerNorm"

    @property
    def _norm_keeps_input(self) -> bool:
        """Or a copy of it in the type of the sums."""
        return self._fused_norm or self.operands.element == self.operands.exact

    def _norm(self, vectors: int, width: int) -> int:
        """What a normalization of so many vectors keeps."""
        x = self.operands
        if not self._fused_norm:
            return vectors * (2 * width + 1) * x.exact  # input, 1 / rms, their product
        numbers = 2 if self.model.normalization == "LayerNorm" else 1
        number = x.exact if self.on_cuda else x.element
        return vectors * (width * x.element + numbers * number)

    def _dropout(self, stream: int) -> int:
        """A mask of the residual stream; the CPU's is one of factors."""
        if not self.model.hidden_dropout:
            return 0
        return stream * self.model.hidden_size * (1 if self.on_cuda else self.operands.element)


def _is_transposed(plan: RunPlan, cp_rank: int) -> bool:
    """Whether attention's result is laid out by heads, so that the projection keeps a copy.

    The reference kernel's is where every query head has keys of its own, and stays so where the
    first tile has all rows.
    """
    sequence = plan.sequence
    heads, kv_heads = local_heads(plan.config.model, plan.grid.tp)
    if heads != kv_heads or heads == 1:
        return False
    if plan.kernel is None or plan.kernel.name != "reference" or sequence.per_batch:
        return False
    tiles = own_tiles(sequence.mask, pack(list(sequence.layout.chunks[cp_rank])))
    return (tiles[0].q0, tiles[0].q1) == (0, sequence.layout.shard_len)
