"""What is corrupted on pipeline stages, or between them, is found, and the rank is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cp_megatron.faults.checks import Checks, ParameterSums
from cp_megatron.plan.pipeline import PipelinePlan
from cp_megatron.train.optimizer import local_values
from cp_megatron.train.step import TrainStep
from tests.context_parallel.test_link_sums import flipping
from tests.ranks import run_ranks
from tests.train.expert_training import ROWS, Case, shards_of, train_step_of

FOUR = Case(style="tied", num_layers=4, document_mask=True)


def checked(case: Case) -> tuple[TrainStep, Checks]:
    step = train_step_of(case)
    step = replace(step, sums=ParameterSums(step.model.named_parameters()))
    assert step.sums is not None
    checks = Checks(
        interval=1,
        parameters=step.sums,
        links=step.cp.link_sums,
        stages=step.links,
        tied=step.model.spec.head.tied,
        groups=step.groups,
        control=step.groups.world,
        device=step.device,
    )
    return step, checks


def run_step(
    rank: int, world_size: int, case: Case, victim: int, number: int
) -> tuple[list[str | None], int]:
    """What is found after two steps, in the first of which a bit of a message may flip; and how
    many messages arrived in it."""
    step, checks = checked(case)
    found, messages = list[str | None](), [0]
    for place in range(2):
        shards = shards_of(place, case, step)
        told = step.announce(shards, step=place + 1)
        checks.begin(place + 1)
        with flipping(number if rank == victim and place == 0 else -1) as seen:
            step.launch(shards, told, step=place + 1, lr=1e-3).result()
        messages.append(seen[0])
        found.append(checks.find(place + 1))
    return found, messages[1]


@pytest.mark.parametrize(
    ("case", "neighbours"),
    [
        (replace(FOUR, pp=4), {1, 3}),
        (replace(FOUR, pp=2, num_chunks=2), {0}),  # messages also go from the last to the first
    ],
    ids=["pp4", "pp2 interleaved"],
)
def test_a_message_that_is_corrupted_between_stages_is_found(
    case: Case, neighbours: set[int]
) -> None:
    size, victim = case.pp, case.pp // 2
    unharmed = run_ranks(run_step, size, case, victim, -1)
    assert [found for found, _ in unharmed] == [[None, None]] * size
    num_messages = unharmed[victim][1]
    senders = set[int]()
    plan = PipelinePlan(case.pp, ROWS, case.num_chunks)
    received = [plan.received(victim, action) for action in plan.actions(victim)]
    channels = [message.channel for message in received if message is not None]
    assert num_messages == len(channels)
    for number in sorted({channels.index(channel) for channel in channels}):
        results = [found for found, _ in run_ranks(run_step, size, case, victim, number)]
        assert results == [results[0]] * size
        first, second = results[0]
        assert first is not None
        start, end = f"rank {victim}: messages from rank ", " arrived corrupted"
        assert first.startswith(start), first
        assert first.endswith(end), first
        senders.add(int(first.removeprefix(start).removesuffix(end)))
        assert second is None, "the sums begin anew"
    assert senders == neighbours


def drift(rank: int, world_size: int, case: Case, odd: int) -> str | None:
    """The finding if the embedding of one rank changes in an update."""
    step, checks = checked(case)
    embedding = step.model.embedding
    if rank == odd and embedding is not None:
        with torch.no_grad():
            local_values(embedding.weight).add_(1)
    checks.parameters.take()
    return checks.find(1)


def test_copies_of_a_tied_embedding_that_drift_apart_are_named() -> None:
    case = replace(FOUR, pp=2, tp=2)
    assert run_ranks(drift, 4, case, -1) == [None] * 4
    assert run_ranks(drift, 4, case, 3) == ["rank 1, 3: copies of the embedding differ"] * 4
