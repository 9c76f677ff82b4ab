"""How many parameters a model has and where they lie, by arithmetic; no torch, no tensor.

The table below is what ``model/`` builds; a test of the model holds the two against each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from cp_megatron.config import ModelConfig
from cp_megatron.plan import Grid


class Parameter(NamedTuple):
    """One parameter, as many times as the model has it.

    Attributes:
        name: what it is.
        shape: its global shape; the first dim is the output.
        tp_dim: the dim that tensor parallelism splits, None when every TP rank holds it whole.
        copies: how often the model has it.
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    copies: int


def parameters(
    model: ModelConfig, *, vocab_size: int, seq_length: int, tp: int = 1
) -> Iterator[Parameter]:
    """Every parameter of the model.

    Args:
        model: the model.
        vocab_size: rows of the embedding, padding included.
        seq_length: rows of the learned position table where the model does not say them.
        tp: tensor parallel size; with more ranks than key/value heads these are not split.
    """
    hidden = model.hidden_size
    yield Parameter("embedding", (vocab_size, hidden), 0, 1)
    if model.position_embedding_type == "learned_absolute":
        yield Parameter("positions", (model.max_position_embeddings or seq_length, hidden), None, 1)
    yield from _layer(model, tp)
    yield from _norm(model, "final norm", 1)
    if model.untie_embeddings_and_output_weights:
        yield Parameter("head", (vocab_size, hidden), 0, 1)


def _layer(model: ModelConfig, tp: int) -> Iterator[Parameter]:
    hidden, ffn, layers = model.hidden_size, model.ffn_size, model.num_layers
    q_width = model.num_attention_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    kv_dim = None if model.num_kv_heads % tp else 0
    columns = [("q", q_width, 0), ("k", kv_width, kv_dim), ("v", kv_width, kv_dim)]
    columns += [("gate", ffn, 0), ("up", ffn, 0)] if model.swiglu else [("up", ffn, 0)]
    rows = [("attention output", q_width), ("down", ffn)]
    yield from _norm(model, "norms", 2 * layers)
    if model.qk_layernorm:
        yield from _norm(model, "head norms", 2 * layers, width=model.head_dim)
    for name, width, dim in columns:
        yield Parameter(name, (width, hidden), dim, layers)
        if model.has_qkv_bias if name in ("q", "k", "v") else not model.disable_bias_linear:
            yield Parameter(f"{name} bias", (width,), dim, layers)
    for name, width in rows:
        yield Parameter(name, (hidden, width), 1, layers)
        if not model.disable_bias_linear:
            yield Parameter(f"{name} bias", (hidden,), None, layers)


def _norm(
    model: ModelConfig, name: str, copies: int, width: int | None = None
) -> Iterator[Parameter]:
    yield Parameter(name, (width or model.hidden_size,), None, copies)
    if model.normalization == "LayerNorm":
        yield Parameter(f"{name} bias", (width or model.hidden_size,), None, copies)


def num_parameters(model: ModelConfig, *, vocab_size: int, seq_length: int) -> int:
    """Parameters of the whole model, each counted once.

    Args:
        model: the model.
        vocab_size: rows of the embedding, padding included.
        seq_length: as in ``parameters``.
    """
    rows = parameters(model, vocab_size=vocab_size, seq_length=seq_length)
    return sum(math.prod(row.shape) * row.copies for row in rows)


def parameters_on_rank(
    model: ModelConfig, *, vocab_size: int, seq_length: int, grid: Grid, rank: int
) -> int:
    """Parameters that ``rank`` stores: its tensor parallel part, sharded over dp x cp.

    FSDP2 cuts dim 0 into pieces of equal, rounded-up size; the last ranks may hold less.
    """
    shards, shard = grid.size("dp_cp"), grid.index("dp_cp", rank)
    total = 0
    for row in parameters(model, vocab_size=vocab_size, seq_length=seq_length, tp=grid.tp):
        local = [
            size // grid.tp if dim == row.tp_dim else size for dim, size in enumerate(row.shape)
        ]
        piece = -(-local[0] // shards)
        held = min(piece, max(0, local[0] - shard * piece))
        total += held * math.prod(local[1:]) * row.copies
    return total


def matmul_parameters(model: ModelConfig, padded_vocab: int) -> int:
    """Parameters a token is multiplied with: all matrices but the tables it is looked up in."""
    tables = {"positions"} | ({"embedding"} if model.untie_embeddings_and_output_weights else set())
    rows = parameters(model, vocab_size=padded_vocab, seq_length=1)
    return sum(
        math.prod(row.shape) * row.copies
        for row in rows
        if len(row.shape) == 2 and row.name not in tables
    )
