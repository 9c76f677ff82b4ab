"""The validation inside training is a mean over tokens, the same on any grid."""

from __future__ import annotations

import pytest

from cp_megatron.data.batch.batch import IGNORED
from tests.ranks import run_ranks
from tests.train.test_step import Case, alone, batches_of, shards_of, train_step_of

ROUNDS = 2


def validation(rank: int, world_size: int, style: str, case: Case) -> float:
    train_step = train_step_of(style, case)
    return train_step.evaluate(
        shard for number in range(ROUNDS) for shard in shards_of(number, case, train_step)
    )


def by_batches(rank: int, world_size: int, style: str, case: Case) -> tuple[float, list[int]]:
    """The mean over tokens from one micro batch at a time, and how many each one has."""
    train_step = train_step_of(style, case)
    total, counts = 0.0, []
    for number in range(ROUNDS):
        for batch in batches_of(number, case, train_step.groups):
            mean = train_step.evaluate([train_step.prepare(batch)])
            counts.append(int((batch.labels != IGNORED).sum()))
            total += mean * counts[-1]
    return total / sum(counts), counts


@pytest.mark.parametrize(
    ("style", "case"),
    [
        ("gpt", Case(cp=4, document_mask=True, micro_batch_size=2, padding=8)),
        ("gpt", Case(dp=2, cp=2, padding=4)),
        *(
            pytest.param(style, case, marks=pytest.mark.slow)
            for style, case in [
                ("llama", Case(cp=4, padding=8, micro_batch_size=2)),
                ("llama", Case(tp=2, cp=2, document_mask=True, layout="balanced", padding=2)),
                ("llama", Case(dp=4)),
            ]
        ),
    ],
)
def test_validation_equals_one_rank(style: str, case: Case) -> None:
    ((expected, counts),) = run_ranks(by_batches, 1, style, alone(case))
    assert 0 in counts
    assert len(set(counts)) > 2
    for found in run_ranks(validation, 4, style, case):
        assert found == pytest.approx(expected, rel=1e-10)
