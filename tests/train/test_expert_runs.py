"""Whole runs of a mixture of experts, from their flags to their metrics and checkpoints."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of
from tests.train.test_loop import STEPS, STOP, Place, train
from tests.train.test_loop import place as place  # the fixture

FLAGS = [
    *("--num-experts", "8", "--moe-ffn-hidden-size", "16", "--expert-model-parallel-size", "4"),
    *("--moe-aux-loss-coeff", "0.01", "--moe-z-loss-coeff", "0.001"),
    *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    *("--tensor-parallel-size", "2", "--context-parallel-size", "2", "--sequence-parallel"),
]


MORE = [
    ["--optimizer-cpu-offload", "--check-interval", "1", "--log-params-norm"],
    ["--optimizer", "muon"],
    ["--bf16", "--recompute-granularity", "full", "--cpu-offloading"],
]


@pytest.mark.parametrize(
    "more", [[], *(pytest.param(flags, marks=pytest.mark.slow) for flags in MORE)], ids=" ".join
)
def test_a_stopped_run_continues_bit_for_bit_and_logs_its_experts(
    place: Place, more: list[str]
) -> None:
    flags = [*FLAGS, *more]
    run_ranks(train, 4, place.argv("whole", *flags))
    assert run_ranks(train, 4, place.argv("parts", *flags), STOP) == [STOP] * 4
    load = ["--load", place.run("parts")]
    assert run_ranks(train, 4, place.argv("parts", *flags, *load)) == [STEPS] * 4
    whole, parts = place.folder / "whole", place.folder / "parts"
    assert differing(whole / f"step-{STEPS}", parts / f"step-{STEPS}") == []
    for row, other in zip(metrics_of(whole), metrics_of(parts), strict=True):
        experts = {name: value for name, value in row.items() if name.startswith("moe_")}
        assert experts == {name: other[name] for name in experts}
        assert experts["moe_aux_loss"] == pytest.approx(0.011, abs=0.003)
        assert 0 < experts["moe_z_loss"] < 0.02
        assert 1 <= experts["moe_rank_load"] <= experts["moe_expert_load"] <= 8
