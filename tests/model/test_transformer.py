"""Tests the model against the same mathematics written by hand, its parts, and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.rng import hidden_dropout_seed
from cp_megatron.config import MemoryConfig, ModelConfig
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.config.schema import Recompute
from cp_megatron.context_parallel import ContextParallel, KeptAttention
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.stream_dropout import StreamDropout
from cp_megatron.model import Transformer
from cp_megatron.model.initialize import initial_value
from cp_megatron.model.mlp import MLP
from cp_megatron.model.norm import Norm
from cp_megatron.plan import Mask
from cp_megatron.plan.stages import Stages
from cp_megatron.spec import ModelSpec
from cp_megatron.tensor_parallel import ColumnParallelLinear, TensorParallel, named_specs
from tests.model.grids import BLOCKS, GPT, LLAMA, SEQ, STYLES, VOCAB, batch

Weights = dict[str, Tensor]


def transformer(config: ModelConfig, **options: object) -> Transformer:
    """A float64 model on one rank with its initial weights, made large enough to matter."""
    arguments = {"seq_length": SEQ, "vocab_size": VOCAB, "tp": None, "sequence_parallel": False}
    model = Transformer(config, **{**arguments, **options}).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for owner, name, spec in named_specs(model):
            value = initial_value(spec, config=config, seed=1).double()
            seeded = torch.Generator().manual_seed(len(spec.name))
            noise = torch.randn(value.shape, generator=seeded)
            owner.get_parameter(name).copy_(5 * value + 0.1 * noise)
    return model


def one_rank(mask: Mask | None = None) -> ContextParallel:
    return ContextParallel(None, mask or Mask.causal(SEQ), kernel="reference")


def by_hand(
    config: ModelConfig,
    w: Weights,
    tokens: Tensor,
    positions: Tensor,
    factors: Sequence[Tensor | float] | None = None,
) -> Tensor:
    """Logits [b, s, VOCAB] of one causal sequence, in torch's plain functions; ``factors`` are
    those of what the embedding, the first layer's attention, its MLP and so on add."""
    factor = iter(factors or [1.0] * (2 * config.num_layers + 1))
    x = w["embedding.weight"][tokens]
    if config.position_embedding_type == "learned_absolute":
        x = x + w["positions.weight"][positions]
    x = x * next(factor)
    for i in range(config.num_layers):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if f"layers.{i}." in k}
        h = norm_by_hand(config, layer, "attention_norm", x)
        x = x + attention_by_hand(config, layer, h, positions) * next(factor)
        h = norm_by_hand(config, layer, "mlp_norm", x)
        up = linear_by_hand(layer, "mlp.up", h)
        if config.swiglu:
            gate = linear_by_hand(layer, "mlp.gate", h)
            up = gate * torch.sigmoid(gate) * up
        else:
            up = 0.5 * up * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)))
        x = x + linear_by_hand(layer, "mlp.down", up) * next(factor)
    x = norm_by_hand(config, w, "norm", x)
    return x @ w.get("head.weight", w["embedding.weight"])[:VOCAB].T


def linear_by_hand(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def norm_by_hand(config: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    if config.normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
    return x * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(()))


def attention_by_hand(config: ModelConfig, w: Weights, h: Tensor, positions: Tensor) -> Tensor:
    b, s, _ = h.shape
    q, k, v = (
        linear_by_hand(w, f"attention.{name}", h).view(b, s, -1, config.head_dim).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    if config.qk_layernorm:
        q = norm_by_hand(config, w, "attention.query_norm", q)
        k = norm_by_hand(config, w, "attention.key_norm", k)
    if config.position_embedding_type == "rope":
        q, k = rotate_by_hand(config, q, positions), rotate_by_hand(config, k, positions)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return linear_by_hand(w, "attention.out", out.transpose(1, 2).reshape(b, s, -1))


def rotate_by_hand(config: ModelConfig, x: Tensor, positions: Tensor) -> Tensor:
    """As Hugging Face writes it: x * cos + rotate_half(x) * sin."""
    d = config.head_dim
    frequencies = 1.0 / config.rotary_base ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.outer(positions.double(), frequencies).repeat(1, 2)
    half = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), dim=-1)
    return x * angles.cos() + half * angles.sin()


@pytest.mark.parametrize("style", [x for x in STYLES if x not in BLOCKS])
def test_logits_are_those_of_the_mathematics(style: str) -> None:
    model, tokens = transformer(STYLES[style]), batch()[0]
    expected = by_hand(STYLES[style], dict(model.state_dict()), tokens, torch.arange(SEQ))
    actual = model(tokens, cp=one_rank())[..., :VOCAB]
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("config", [GPT, LLAMA])
def test_hidden_dropout_is_that_of_the_mathematics(config: ModelConfig) -> None:
    config, dropout = replace(config, hidden_dropout=0.2), Dropout(0.2, seed=3, batch0=5)
    model, tokens = transformer(config), batch()[0]
    hashed = replace(dropout, seed=hidden_dropout_seed(seed=3))
    first = StreamDropout.of(hashed, torch.arange(SEQ), len(tokens))
    drops = [first, *(one for i in range(config.num_layers) for one in first.in_layer(i))]
    ones = torch.ones(*tokens.shape, config.hidden_size, dtype=torch.float64)
    factors = [one.drop(ones) for one in drops]
    expected = by_hand(config, dict(model.state_dict()), tokens, torch.arange(SEQ), factors)
    actual = model(tokens, cp=one_rank(), hidden_dropout=dropout)[..., :VOCAB]
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(
    "config",
    [*BLOCKS.values(), replace(LLAMA, num_experts=4, moe_layers=(1,), moe_ffn_hidden_size=8)],
)
def test_every_block_drops_at_its_own_place(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop, places = StreamDropout.drop, list[int]()

    def dropped(self: StreamDropout, x: Tensor) -> Tensor:
        places.append(self.place)
        return drop(self, x)

    monkeypatch.setattr(StreamDropout, "drop", dropped)
    model, dropout = transformer(replace(config, hidden_dropout=0.2)), Dropout(0.2, seed=3)
    model(batch()[0], cp=one_rank(), hidden_dropout=dropout)
    assert places == list(range(2 * config.num_layers + 1))
    places.clear()
    model.eval()(batch()[0], cp=one_rank())
    assert not places


@pytest.mark.parametrize("config", [GPT, LLAMA])
def test_positions_are_those_of_the_documents(config: ModelConfig) -> None:
    """Two packed documents are two sequences."""
    model, tokens = transformer(config), batch()[0][:1]
    packed = model(tokens, cp=one_rank(Mask.documents([12, 20])))[..., :VOCAB]
    weights = dict(model.state_dict())
    for document in (slice(0, 12), slice(12, 32)):
        part = tokens[:, document]
        expected = by_hand(config, weights, part, torch.arange(part.shape[1]))
        torch.testing.assert_close(packed[:, document], expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("config", [GPT, LLAMA])
@pytest.mark.parametrize("untied", [False, True])
def test_chunks_of_layers_chain_to_the_model(config: ModelConfig, untied: bool) -> None:
    config = replace(config, num_layers=3, untie_embeddings_and_output_weights=untied)
    config, dropout = replace(config, hidden_dropout=0.2), Dropout(0.2, seed=3)
    model, tokens, cp = transformer(config), batch()[0], one_rank()
    cut = Stages((range(0), range(1), range(1, 2), range(2, 3)), num_stages=2)
    stages = [transformer(config, chunks=cut.of(stage)) for stage in range(2)]
    x = tokens
    for chunk in range(2):
        for stage in stages:
            x = stage(x, cp=cp, chunk=chunk, hidden_dropout=dropout)
    assert torch.equal(x, model(tokens, cp=cp, hidden_dropout=dropout))
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    copies = [] if untied else ["embedding.weight"]
    assert sorted(names) == sorted([*copies, *(name for name, _ in model.named_parameters())])
    assert [stage.copies_embedding for stage in stages] == [False, not untied]


def test_tied_weights_exist_once() -> None:
    names = [name for name, _ in transformer(GPT).named_parameters(remove_duplicate=False)]
    assert "embedding.weight" in names
    assert "head.weight" not in names
    assert "head.weight" in dict(transformer(LLAMA).named_parameters())


def test_llama_has_no_bias_and_no_position_table() -> None:
    names = [name for name, _ in transformer(LLAMA).named_parameters()]
    assert not [name for name in names if "bias" in name or "positions" in name]


def test_no_positions_at_all() -> None:
    config = replace(GPT, position_embedding_type="none")
    assert transformer(config).positions is None


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_has_as_many_parameters_as_the_start_table_says(preset: str) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = Transformer(
            config.model,
            seq_length=config.data.seq_length,
            vocab_size=VOCAB,
            tp=None,
            sequence_parallel=False,
        )
    spec = ModelSpec.of(config.model, vocab_size=VOCAB, seq_length=config.data.seq_length)
    assert sum(p.numel() for p in model.parameters()) == spec.num_parameters()
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert shapes == [(parameter.name, parameter.shape) for parameter in spec.parameters()]


def saved_bytes(recompute: Recompute) -> int:
    """Bytes that the layers keep for backward, every storage once, weights not counted."""
    model = transformer(GPT, memory=MemoryConfig(recompute_granularity=recompute))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = model(batch()[0], cp=one_rank())
    assert logits.requires_grad
    return sum(kept.values())


def test_recomputation_keeps_less() -> None:
    none, selective, full = (saved_bytes(level) for level in ("none", "selective", "full"))
    assert full < 0.6 * selective < 0.3 * none


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_dropout_is_the_same_when_recomputed(recompute: Recompute) -> None:
    config = replace(GPT, hidden_dropout=0.5)
    gradients = []
    for level in ("none", recompute):
        model = transformer(config, memory=MemoryConfig(recompute_granularity=level))
        dropout = Dropout(0.5, seed=3)
        logits = model(batch()[0], cp=one_rank(), hidden_dropout=dropout)
        logits[..., :VOCAB].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_every_layer_drops_pairs_of_its_own_in_training(
    recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryConfig(recompute_granularity=recompute)
    model = transformer(replace(GPT, attention_dropout=0.5), memory=memory)
    cp, (tokens, _) = one_rank(), batch()
    attend, given = cp.attention, []

    def attention(
        *heads: Any, dropout: Dropout | None, kept: KeptAttention | None, **more: Any
    ) -> Tensor:
        given.append(dropout)
        return attend(*heads, dropout=dropout, kept=kept, **more)

    monkeypatch.setattr(cp, "attention", attention)
    dropout = Dropout(0.5, seed=3, batch0=7, head0=2)
    model(tokens, cp=cp, attention_dropout=dropout).sum().backward()
    assert len({each.seed for each in given}) == GPT.num_layers
    assert {replace(each, seed=3) for each in given} == {dropout}
    given.clear()
    model.eval()(tokens, cp=cp)
    assert given == [None] * GPT.num_layers
    with pytest.raises(AssertionError):
        model.train()(tokens, cp=cp)


def test_norms_and_mlp_never_receive_a_group() -> None:
    unchanged = (Norm, MLP, ColumnParallelLinear)
    for config in (GPT, LLAMA):
        model = transformer(config)
        found = [module for module in model.modules() if isinstance(module, unchanged)]
        assert {type(module) for module in found} >= {MLP}
        for module in found:
            assert not [x for x in vars(module).values() if isinstance(x, TensorParallel)]
    for module in model.modules():
        # The group of context parallelism comes with each batch; no module keeps one.
        held = [x for x in vars(module).values() if isinstance(x, ContextParallel | ProcessGroup)]
        assert not held


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": SEQ - 1},
        {"kv_channels": 7, "position_embedding_type": "rope"},
    ],
)
def test_a_model_that_cannot_work_raises(change: dict[str, object]) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        transformer(replace(GPT, **change))(batch()[0], cp=one_rank())  # type: ignore[arg-type]
