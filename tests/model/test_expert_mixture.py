"""A mixture of experts against a loop over all experts on whole tensors, on one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import MemoryConfig, ModelConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.expert_parallel import ExpertParallel
from cp_megatron.model import Transformer, build_model
from cp_megatron.model.expert_mixture import ExpertMixture
from cp_megatron.model.initialize import initial_value
from cp_megatron.model.layer_memory import LayerMemory
from cp_megatron.model.row_counts import TokenRows
from cp_megatron.plan import Grid, Mask
from cp_megatron.spec import ExpertMixtureSpec
from cp_megatron.tensor_parallel import TensorParallel, named_specs
from cp_megatron.train.optimizer import decay_groups, stacked_vectors
from tests.model.grids import error
from tests.ranks import run_ranks
from tests.train.expert_training import MODEL, SOFTMAX, VOCAB, Case, config_of

BATCH, LENGTH = 2, 12
GPT_OSS = replace(
    SOFTMAX,
    swiglu=False,
    quick_geglu=True,
    activation_func_clamp_value=0.7,
    glu_linear_offset=1.0,
    moe_router_pre_softmax=False,
)
PLAIN = replace(SOFTMAX, swiglu=False, moe_router_topk=1)
KINDS = {"sigmoid": MODEL, "softmax": SOFTMAX, "gpt-oss": GPT_OSS, "no gate": PLAIN}


def mixture_of(model: ModelConfig) -> ExpertMixture:
    memory = LayerMemory.of(MemoryConfig(), 0, attends=True, tp=TensorParallel(), offload=None)
    spec = ExpertMixtureSpec.of(model)
    mixture = ExpertMixture(spec, memory=memory, parallel=ExpertParallel()).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4, generator=generator)
    if spec.router.corrects:
        mixture.router.expert_bias.normal_(0.0, 0.2, generator=generator)
    return mixture


def inputs() -> tuple[Tensor, TokenRows]:
    """Two lines of two rows each, and padding."""
    x = torch.randn(BATCH, LENGTH, 16, dtype=torch.float64, generator=torch.Generator())
    rows = TokenRows.of(torch.arange(LENGTH), BATCH, 10, row_length=5)
    return x.requires_grad_(), replace(rows, numbers=rows.numbers.flatten())


def act(gate: Tensor, up: Tensor, model: ModelConfig) -> Tensor:
    if model.quick_geglu:
        gate = gate.clamp(max=model.activation_func_clamp_value)
        bound = model.activation_func_clamp_value
        assert bound is not None
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-bound, bound) + 1)
    return F.silu(gate) * up


def naive(model: ModelConfig, p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the terms of the loss, by dense products with all experts."""
    number, topk, n = model.num_experts or 0, model.moe_router_topk, BATCH * LENGTH
    tokens = x.flatten(0, 1)
    logits = tokens @ p["router.weight"].T + p.get("router.bias", 0.0)
    if model.moe_router_score_function == "sigmoid":
        scores = logits.sigmoid()
        chosen = (scores + p["router.expert_bias"]).topk(topk).indices
        weights = scores.gather(1, chosen)
        weights, probabilities = weights / weights.sum(1, True), scores / scores.sum(1, True)
    else:
        probabilities = logits.softmax(1)
        chosen = probabilities.topk(topk).indices
        weights = probabilities.gather(1, chosen)
        if not model.moe_router_pre_softmax:
            weights = weights / weights.sum(1, True)
    gates = torch.zeros(n, number, dtype=torch.float64).scatter(1, chosen, weights)
    bias = {name: p.get(f"experts.{name}_bias") for name in ("gate", "up", "down")}
    outs = []
    for e in range(number):

        def linear(y: Tensor, name: str, e: int = e) -> Tensor:
            own = bias[name]
            return F.linear(y, p[f"experts.{name}"][e], None if own is None else own[e])

        up = linear(tokens, "up")
        if model.is_gated:
            wide = act(linear(tokens, "gate"), up, model)
        else:
            wide = F.gelu(up, approximate="tanh")
        outs.append(linear(wide, "down"))
    out = torch.einsum("ne,neh->nh", gates, torch.stack(outs, 1)).view_as(x)
    if "shared.up.weight" in p:
        wide = F.silu(x @ p["shared.gate.weight"].T) * (x @ p["shared.up.weight"].T)
        out = out + wide @ p["shared.down.weight"].T * (x @ p["shared_gate.weight"].T).sigmoid()
    aux = z = torch.zeros((), dtype=torch.float64)
    for line in range(BATCH):
        for first in (0, 5):
            row = slice(line * LENGTH + first, line * LENGTH + first + 5)
            frequency = F.one_hot(chosen[row], number).double().sum((0, 1)) / 5
            aux = aux + 5 * number / topk * (frequency * probabilities[row].mean(0)).sum()
            z = z + logits[row].logsumexp(1).square().sum()
    return out, torch.stack([0.5 * aux, 0.01 * z])


@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_those_of_a_loop_over_experts(kind: str) -> None:
    model = KINDS[kind]
    mixture, (x, rows) = mixture_of(model), inputs()
    named = {**dict(mixture.named_parameters()), **dict(mixture.named_buffers())}
    wished = torch.randn(x.shape, dtype=torch.float64)

    def gradients(out: Tensor, terms: Tensor) -> dict[str, Tensor]:
        objective = (out * wished).sum() + terms.sum()
        wanted = {"x": x, **{name: p for name, p in named.items() if p.requires_grad}}
        found = torch.autograd.grad(objective, list(wanted.values()))
        return dict(zip(wanted, found))

    mixed = mixture(x, rows, None)
    assert mixed.terms is not None
    out, terms = naive(model, named, x)
    assert error(mixed.stream.detach(), out.detach()) < 1e-13
    assert error(mixed.terms.detach(), terms.detach()) < 1e-13
    expected = gradients(out, terms)
    for name, gradient in gradients(mixed.stream, mixed.terms).items():
        assert error(gradient, expected[name]) < 1e-12, name
    assert mixed.counts is not None
    assert int(mixed.counts.sum()) == 20 * model.moe_router_topk  # 4 rows of 5 tokens


def test_without_rows_nothing_is_counted() -> None:
    mixture, (x, rows) = mixture_of(MODEL), inputs()
    mixed = mixture(x, None, None)
    assert (mixed.terms, mixed.counts) == (None, None)
    assert torch.equal(mixed.stream, mixture(x, rows, None).stream)


def test_tensor_parallelism_needs_sequence_parallelism() -> None:
    assert run_ranks(refused, 2) == ["--sequence-parallel"] * 2


def refused(rank: int, world_size: int) -> str:
    groups = ParallelGroups.create(Grid(tp=2), "cpu", has_experts=True)
    try:
        with torch.device("meta"):
            Transformer(
                MODEL, seq_length=8, vocab_size=VOCAB, tp=groups.tp, sequence_parallel=False
            )
    except ConfigError as error:
        return error.flag
    return ""


def test_biases_of_experts_do_not_decay() -> None:
    model = Transformer(SOFTMAX, seq_length=8, vocab_size=VOCAB, tp=None, sequence_parallel=False)
    named = dict(model.named_parameters())
    config = config_of(Case()).optimizer
    decayed, kept = decay_groups(named.values(), config, stacked_vectors(model))
    ids = set(map(id, kept["params"]))
    names = {name for name, parameter in named.items() if id(parameter) in ids}
    assert len(decayed["params"]) + len(kept["params"]) == len(named)
    assert {f"layers.1.mlp.experts.{x}_bias" for x in ("gate", "up", "down")} <= names
    assert {name.rpartition(".")[2] for name in names} == {
        *("weight", "bias", "gate_bias", "up_bias", "down_bias")
    }
    assert all("norm" in name for name in names if name.endswith("weight"))


def test_an_expert_is_drawn_by_its_own_number() -> None:
    model = Transformer(MODEL, seq_length=8, vocab_size=VOCAB, tp=None, sequence_parallel=False)
    (spec,) = (s for _, _, s in named_specs(model) if s.name == "layers.0.mlp.experts.up")
    options: dict[str, Any] = {"config": MODEL, "seed": 3}
    whole, part = initial_value(spec, **options), initial_value(spec, **options, part=range(3, 5))
    assert whole.shape == spec.shape
    assert torch.equal(whole[3:5], part)
    assert whole.std() == pytest.approx(MODEL.init_method_std, rel=0.05)
    assert len({float(expert[0, 0]) for expert in whole}) == 8


def rounded(rank: int, world_size: int, case: Case) -> tuple[float, float, dict[str, torch.dtype]]:
    """Loss and gradient norm in bfloat16, and the types of the router's tensors."""
    groups = ParallelGroups.create(case.grid, "cpu", has_experts=True)
    model = build_model(
        config_of(case),
        groups,
        vocab_size=VOCAB,
        dtype=case.dtype,
        device="cpu",  # type: ignore[arg-type]
    )
    seen = dict[str, torch.dtype]()
    for module in model.modules():
        if isinstance(module, ExpertMixture):
            module.router.register_forward_hook(
                lambda m, args, out: seen.update(input=args[0].dtype, logits=out.dtype)
            )
    cp = ContextParallel(groups.cp, Mask.causal(16))
    tokens = torch.arange(16).repeat(4, 1)
    rows = TokenRows.of(cp.positions, 4, 16)
    shard = cp.shard(tokens, 1)
    trained, losses, report = model(shard, cp=cp, labels=shard, rows=rows)
    (trained + report.terms.sum()).backward()
    total = losses.sum(dtype=torch.float64)
    if groups.grid.world_size > 1:
        torch.distributed.all_reduce(total, group=groups.dp_cp)
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
    norm = sum(
        float(p.grad.full_tensor().double().square().sum())  # type: ignore[attr-defined]
        for p in model.parameters()
        if p.grad is not None
    )
    return float(total), norm**0.5, seen


@pytest.mark.parametrize("style", ["sigmoid", "softmax"])
def test_bfloat16_routes_in_float32(style: str) -> None:
    exact = run_ranks(rounded, 1, Case(style=style, dtype="float32"))[0]
    alone = run_ranks(rounded, 1, Case(style=style, dtype="bfloat16"))[0]
    spread = run_ranks(rounded, 4, Case(style=style, tp=2, cp=2, ep=4, dtype="bfloat16"))[0]
    for loss, norm, seen in (alone, spread):
        assert seen == {"input": torch.bfloat16, "logits": torch.float32}
        assert loss == pytest.approx(exact[0], rel=0.02)
        assert norm == pytest.approx(exact[1], rel=0.1)


def test_terms_are_summed_in_the_type_of_sums() -> None:
    def terms(dtype: torch.dtype, router: Literal["fp32", "model"]) -> Tensor:
        mixture = mixture_of(replace(MODEL, moe_router_dtype=router)).to(dtype)
        tokens = torch.randn(1, 512, 16, generator=torch.Generator()) / 2
        rows = TokenRows(numbers=torch.zeros(512, dtype=torch.int64), num_rows=1)
        found = mixture(tokens.to(dtype), rows, None).terms
        assert found is not None
        return found.detach()

    exact, found = terms(torch.float32, "fp32"), terms(torch.bfloat16, "model")
    assert found.dtype == torch.float32
    assert torch.allclose(found, exact, rtol=2e-3)
    assert not torch.equal(found, found.bfloat16())
