"""Recurrences by ``fla``'s functions on several ranks, tried with a double of them."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from cp_megatron.context_parallel import linear_function
from cp_megatron.kernels.linear_fla import LinearFla
from tests.context_parallel.recurrences import KINDS
from tests.context_parallel.test_linear_attention import MASKS, Case, of_case
from tests.kernels.double_fla import FlaDouble
from tests.ranks import run_ranks

LAYOUTS = {1: ("contiguous",), 2: ("zigzag", "cards"), 3: ("zigzag", "balanced", "cards")}
NAMES = {"gated delta net": "gated delta rule", "kda": "kda", "gla": "gla", "ssd": "simple gla"}


def with_double(case: Case, group: dist.ProcessGroup | None) -> tuple[dict[str, float], FlaDouble]:
    """The errors of a case that a double of fla computes."""
    double = FlaDouble()

    def load(name: str, *pieces: object) -> LinearFla:
        return LinearFla(double.functions, *pieces)  # type: ignore[arg-type]

    with mock.patch.object(linear_function, "load_linear_kernel", load):
        return of_case(case, group), double


def errors(rank: int, world_size: int, cases: Sequence[Case]) -> list[dict[str, float]]:
    group, found = dist.group.WORLD if world_size > 1 else None, []
    for case in cases:
        result, double = with_double(case, group)
        assert {call[0] for call in double.calls} == {NAMES[case.kind]}
        found.append(result)
    return found


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_equals_a_loop_over_tokens(world_size: int) -> None:
    cases = [
        Case(kind, lengths, layout, batch=1 + number % 2, heads=((2, 4), (3, 3))[number % 2])
        for kind in KINDS
        for layout in LAYOUTS[world_size]
        for number, lengths in enumerate(MASKS.values())
    ]
    if world_size < 3:
        cases = cases[::3]
    for result in run_ranks(errors, world_size, cases, timeout=240):
        for case, found in zip(cases, result, strict=True):
            assert max(found.values()) < 1e-12, (case, found)


def calls(rank: int, world_size: int, case: Case) -> list[tuple[str, list[int], int, bool, bool]]:
    return with_double(case, dist.group.WORLD)[1].calls


def test_states_are_asked_of_leaving_segments_only() -> None:
    """Documents of 10, 50, 8 and 28 tokens on two contiguous halves of 48."""
    case = Case("gated delta net", (10, 50, 8, 28), "contiguous", dims=(6, 5))
    first, second = run_ranks(calls, 2, case)
    name = "gated delta rule"
    assert first == [
        (name, [38], 5, False, True),  # summarize
        (name, [10], 5, False, False),  # apply: whole documents, then the one that leaves
        (name, [38], 5, False, False),
        (name, [10], 5, False, False),  # backward
        (name, [38], 5, False, True),
    ]
    assert second == [
        (name, [8, 28], 5, False, False),
        (name, [12], 5, True, False),
        (name, [12], 6, True, False),  # adjoint: Q_eff, as wide as a key
        (name, [8, 28], 5, False, False),
        (name, [12], 5, True, False),
    ]


def rounded(rank: int, world_size: int, case: Case) -> dict[str, float]:
    return with_double(case, dist.group.WORLD if world_size > 1 else None)[0]


def test_ranks_round_no_more_than_one() -> None:
    """In bfloat16, states are float32."""
    case = Case("gated delta net", MASKS["one"], "zigzag", dtype=torch.bfloat16)
    (alone,) = run_ranks(rounded, 1, case)
    for found in run_ranks(rounded, 2, case):
        for name, error in found.items():
            assert error < 2 * alone[name], name
