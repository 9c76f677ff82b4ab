"""Which rank is named when a run breaks."""

from __future__ import annotations

import pytest

from cp_megatron.faults.culprit import Report, judge, kind_of

LOST = Report(kind="lost", where="step 6")
WAITED = Report(kind="waited", where="step 6")
SEEN = {rank: f"process {rank}" for rank in range(4)}


def named(reports: dict[int, Report], alive: set[int]) -> tuple[int, ...]:
    return judge(reports, world_size=4, alive=alive, seen=SEEN)[0]


@pytest.mark.parametrize(
    ("reports", "alive", "culprits"),
    [
        ({0: LOST, 3: LOST}, {0, 1, 3}, (2,)),  # 1 lives and waits for 0 and 3
        ({0: WAITED, 1: WAITED, 3: WAITED}, {0, 1, 3}, (2,)),  # stopped
        ({0: WAITED, 1: WAITED, 3: WAITED}, {0, 1, 2, 3}, (2,)),  # stuck elsewhere
        ({0: LOST}, {0}, (1, 2, 3)),  # a node is gone
        ({0: LOST, 1: LOST}, {0, 1, 2, 3}, ()),  # a cable
        ({0: WAITED, 1: WAITED, 2: WAITED, 3: WAITED}, {0, 1, 2, 3}, ()),  # a message left out
    ],
)
def test_the_culprit(
    reports: dict[int, Report], alive: set[int], culprits: tuple[int, ...]
) -> None:
    assert named(reports, alive) == culprits


def test_the_text_names_what_the_others_met() -> None:
    _, text = judge({0: LOST, 1: WAITED, 3: LOST}, world_size=4, alive={0, 1, 3}, seen=SEEN)
    assert text == (
        "rank 2 (process 2) does not answer (rank 0 lost its peer in step 6; rank 1 waited in "
        "step 6; rank 3 lost its peer in step 6)"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), "lost"),
        (RuntimeError("[gloo] Timed out waiting 6000ms for recv operation"), "waited"),
        (ConnectionResetError("Connection reset by peer"), "lost"),
        (RuntimeError("shapes do not match"), "failed"),
        (ValueError("Connection closed by peer"), "failed"),
        (MemoryError(), "failed"),
    ],
)
def test_what_a_rank_met(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind
