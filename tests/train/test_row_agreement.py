"""A rank that makes other rows than its context and tensor parallel peers stops every rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cp_megatron.data.batch.batch import Batch
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Coordinates
from tests.ranks import run_ranks
from tests.train.test_step import Case, batches_of, train_step_of


def other(batch: Batch, fault: str) -> Batch:
    if fault == "a token":
        tokens = batch.tokens.clone()
        tokens[0, 3] += 1
        return replace(batch, tokens=tokens)
    if fault == "the order":
        return replace(batch, tokens=batch.tokens.roll(1, 1))
    return replace(batch, labels=batch.labels.roll(1, 1))


def answers(rank: int, world_size: int, case: Case, fault: str, odd: int) -> tuple[str, str]:
    """The errors of a training step and of an evaluation."""
    train_step = train_step_of("llama", case)
    batches = batches_of(1, case, train_step.groups)
    if fault == "the other group's":  # the first ranks of both groups exchange their rows
        place = train_step.groups.coordinates
        if place.cp == place.tp == 0:
            swapped = Coordinates(dp=1 - place.dp, cp=0, tp=0)
            batches = batches_of(1, case, replace(train_step.groups, coordinates=swapped))
    elif rank == odd:
        batches[-1] = other(batches[-1], fault)
    shards = [train_step.prepare(batch) for batch in batches]
    said = ["", ""]
    for place, call in enumerate(
        (lambda: train_step.run(shards, step=1, lr=1e-3), lambda: train_step.evaluate(shards))
    ):
        try:
            call()
        except ConfigError as error:
            said[place] = str(error)
    return said[0], said[1]


@pytest.mark.parametrize("fault", ["a token", "the order", "labels"])
@pytest.mark.parametrize(("case", "odd"), [(Case(cp=2, tp=2), 2), (Case(dp=2, cp=2), 3)])
def test_other_rows_stop_every_rank(case: Case, odd: int, fault: str) -> None:
    for both in run_ranks(answers, 4, case, fault, odd):
        for answer in both:
            assert answer.startswith("--data-path: gives the ranks"), answer
            first = 0 if case.tp == 2 else 2
            assert f"rank {odd} other rows than rank {first}" in answer


def test_rows_of_two_groups_exchanged_do_not_cancel() -> None:
    for both in run_ranks(answers, 4, Case(dp=2, cp=2), "the other group's", -1):
        assert all("rank 1 other rows than rank 0" in answer for answer in both), both


def test_right_rows_are_trained_on() -> None:
    assert set(run_ranks(answers, 4, Case(dp=2, cp=2), "none", -1)) == {("", "")}
