"""The terms that balance experts are trained as defined, whatever the labels of a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cp_megatron.data.batch.batch import IGNORED, Batch
from cp_megatron.model.expert_mixture import ExpertMixture, Router
from cp_megatron.spec import BalanceSpec
from cp_megatron.train.step import TrainStep
from tests.ranks import run_ranks
from tests.train.expert_training import MODEL, ROWS, SEQ, Case, batches_of, train_step_of

TOKENS = ROWS * SEQ


def labelled(batches: list[Batch], first: int, count: int) -> list[Batch]:
    """The first ``count`` tokens of the global batch predict themselves; no other has a label.

    Args:
        first: the number of the first token of this rank in the global batch.
    """
    found = []
    for batch in batches:
        labels = torch.full_like(batch.labels, IGNORED)
        tokens = batch.tokens[:, : batch.tokens.shape[1] - batch.padding]
        places = first + torch.arange(tokens.numel()).view_as(tokens)
        labels[:, : tokens.shape[1]] = torch.where(places < count, tokens, IGNORED)
        found.append(replace(batch, labels=labels))
        first += tokens.numel()
    return found


def gradients(step: TrainStep, batches: list[Batch]) -> tuple[list[Tensor], list[float]]:
    """The whole gradient of every router's weight, summed over ranks, and loss and terms."""
    held: list[Tensor] = []

    def refused(loss: Tensor, norm: Tensor) -> Tensor:
        for name, parameter in step.model.named_parameters():
            if "router.weight" in name:
                held.append(parameter.grad.full_tensor().clone())  # type: ignore[union-attr]
        return loss < 0

    shards = [step.prepare(batch) for batch in batches]
    found = step.run(shards, step=1, lr=0.0, accept=refused)
    assert found.experts is not None
    return held, [found.loss, found.experts.aux_loss, found.experts.z_loss]


def measured(
    rank: int, world_size: int, case: Case
) -> dict[int, tuple[list[Tensor], list[Tensor], list[float]]]:
    """By number of labels: the routers' gradients of the whole sum and of its terms, and what the
    step reports."""
    step = train_step_of(case)
    mixtures = [x for x in step.model.modules() if isinstance(x, ExpertMixture)]
    specs = [mixture.spec for mixture in mixtures]
    batches, first = batches_of(0, case, step), step.groups.coordinates.dp * TOKENS // case.dp
    none = BalanceSpec(kind="none", coefficient=0.0, z_coefficient=0.0, bias_rate=None)
    found = {}
    for count in (TOKENS, 6, 0):
        rows = labelled(batches, first, count)
        whole, numbers = gradients(step, rows)
        for mixture in mixtures:
            mixture.spec = replace(mixture.spec, balance=none)
        loss, _ = gradients(step, rows)
        for mixture, spec in zip(mixtures, specs):
            mixture.spec = spec
        found[count] = whole, [one - other for one, other in zip(whole, loss)], numbers
    return found


@pytest.mark.parametrize(
    "case", [Case(), Case(tp=2, dp=2, ep=2, padding=2), Case(cp=2, ep=2, kind="aux_loss")]
)
def test_terms_do_not_depend_on_labels(case: Case) -> None:
    for found in run_ranks(measured, case.grid.world_size, case):
        whole, terms, numbers = found[TOKENS]
        assert numbers[0] > 1
        assert min(numbers[1:]) > 0.01
        assert found[0][2][0] == 0.0
        for count in (6, 0):
            assert found[count][2][1:] == pytest.approx(numbers[1:], rel=1e-12)
            for one, other in zip(found[count][1], terms):
                assert (one - other).norm() < 1e-12 * other.norm()
        # Without labels, the terms are all that is trained.
        for one, other in zip(found[0][0], terms):
            assert (one - other).norm() < 1e-12 * other.norm()
        assert all((one - other).norm() > 1e-3 * other.norm() for one, other in zip(whole, terms))


def against_plain(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """The gradient of the last router without labels, and that of the terms as they are defined.

    Nothing but its own terms depends on the last router then.
    """
    case, seen = Case(), list[Tensor]()
    step = train_step_of(case)
    router = [x for x in step.model.modules() if isinstance(x, Router)][-1]
    router.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    (*_, found), _ = gradients(step, labelled(batches_of(0, case, step), 0, 0))
    weight = router.get_parameter("weight").detach()
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()
    weight.requires_grad_()
    experts, topk = MODEL.num_experts or 1, MODEL.moe_router_topk
    total = torch.zeros((), dtype=torch.float64)
    for tokens in seen:  # micro batches of one row
        logits = tokens @ weight.T
        scores = logits.sigmoid()
        chosen = torch.zeros(experts, dtype=torch.float64)
        for token in scores.detach():
            chosen[token.topk(topk).indices] += 1
        shares = (scores / scores.sum(1, keepdim=True)).mean(0)
        imbalance = experts * (chosen / (topk * SEQ) * shares).sum()
        total = total + MODEL.moe_aux_loss_coeff * imbalance / ROWS
        squares = logits.exp().sum(1).log().square()
        total = total + MODEL.moe_z_loss_coeff * squares.sum() / TOKENS
    total.backward()
    assert weight.grad is not None
    return found, weight.grad


def test_both_terms_are_trained_as_they_are_defined() -> None:
    ((found, expected),) = run_ranks(against_plain, 1)
    assert (found - expected).norm() < 1e-10 * expected.norm()
