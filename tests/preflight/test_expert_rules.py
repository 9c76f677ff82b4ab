"""Flags of experts that contradict one another are refused, and what the error advises works."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.config.fields import settings
from cp_megatron.errors import CombinedError, ConfigError
from cp_megatron.preflight.check import check
from cp_megatron.preflight.run_plan import RunPlan

EXPERTS = "--num-experts 8"
EP = "--expert-model-parallel-size"
TP = "--tensor-parallel-size 2"
SIGMOID = f"{EXPERTS} --moe-router-score-function sigmoid"
EIGHT = f"{EXPERTS} --moe-router-num-groups 8 --moe-router-group-topk 1"
GROUPS = f"{EXPERTS} --moe-router-num-groups 4 --moe-router-group-topk"


def planned(words: str, *, world_size: int | None = None) -> RunPlan:
    """A dry run on the text of this file, which is read faster than the default data."""
    arguments = parse_arguments(["--preset", "toy", "--data-path", __file__, *words.split()])
    return check(
        arguments.config,
        Launch(),
        dry_run=True,
        dry_run_world_size=world_size,
        given=arguments.given,
    )


def refusal(words: str, *, world_size: int | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        planned(words, world_size=world_size)
    assert not isinstance(caught.value, CombinedError), caught.value
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("words", "told", "works"),
    [
        # which layers have experts
        (f"{EXPERTS} --moe-layers 2", "must be numbers from 0 to 1", f"{EXPERTS} --moe-layers 1"),
        (f"{EXPERTS} --moe-layers 0 0", "names a layer twice", f"{EXPERTS} --moe-layers 0"),
        (
            f"{EXPERTS} --moe-layers 0 --moe-layer-freq 2",
            "contradicts --moe-layer-freq",
            f"{EXPERTS} --moe-layer-freq 2",
        ),
        # how many
        ("--num-experts 4 --moe-router-topk 5", "works: 4", "--num-experts 4 --moe-router-topk 4"),
        (
            f"{EXPERTS} {EP} 3 --global-batch-size 6",
            "by --expert-model-parallel-size 3 .works: 6, 9",
            f"{EXPERTS} {EP} 2",
        ),
        (f"--num-experts 2 {EP} 4", "holds whole experts", f"--num-experts 4 {EP} 4"),
        (f"{EP} 2", "has no effect without --num-experts", f"{EXPERTS} {EP} 2"),
        # scores
        (
            f"{EXPERTS} --moe-router-topk 1",
            "weight every chosen expert by 1",
            f"{EXPERTS} --moe-router-topk 1 --moe-router-pre-softmax",
        ),
        (
            f"{SIGMOID} --moe-router-topk 1",
            "works: --no-moe-router-norm-topk-prob",
            f"{SIGMOID} --moe-router-topk 1 --no-moe-router-norm-topk-prob",
        ),
        (
            "--num-experts 1 --moe-router-topk 1 --moe-router-pre-softmax",
            "works: --num-experts 2 --moe-router-topk 2",
            "--num-experts 2 --moe-router-topk 2 --moe-router-pre-softmax",
        ),
        (
            "--num-experts 1 --moe-router-score-function sigmoid",
            "would always weight its expert by 1",
            "--num-experts 1 --moe-router-topk 1 --moe-router-score-function sigmoid"
            " --no-moe-router-norm-topk-prob",
        ),
        (
            f"{EIGHT} --moe-router-topk 1",
            "works: --moe-router-pre-softmax.$",
            f"{EIGHT} --moe-router-topk 1 --moe-router-pre-softmax",
        ),
        (f"{SIGMOID} --moe-router-pre-softmax", "has no effect with .* sigmoid", SIGMOID),
        (f"{EXPERTS} --no-moe-router-norm-topk-prob", "without sigmoid scores", SIGMOID),
        # groups
        (f"{EXPERTS} --moe-router-group-topk 2", "needs --moe-router-num-groups", f"{GROUPS} 2"),
        (f"{EXPERTS} --moe-router-num-groups 4", "needs --moe-router-group-topk", f"{GROUPS} 2"),
        (f"{GROUPS} 5", "at most --moe-router-num-groups 4", f"{GROUPS} 4"),
        (f"{GROUPS} 1 --moe-router-topk 3", "at most 2, the experts in 1 of 4", f"{GROUPS} 1"),
        (
            f"{GROUPS} 2 --moe-router-group-num-scores 3",
            "at most 2, a group's experts",
            f"{GROUPS} 2 --moe-router-group-num-scores 2",
        ),
        (
            f"{EXPERTS} --moe-router-num-groups 3 --moe-router-group-topk 1",
            "must divide --num-experts 8",
            f"{EXPERTS} --moe-router-num-groups 2 --moe-router-group-topk 1",
        ),
        (
            f"{EXPERTS} --moe-router-group-num-scores 2",
            "without groups of experts",
            f"{GROUPS} 2 --moe-router-group-num-scores 2",
        ),
        # balance
        (
            f"{EXPERTS} --moe-router-load-balancing-type aux_loss",
            "with --moe-aux-loss-coeff 0",
            f"{EXPERTS} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3",
        ),
        (
            f"{EXPERTS} --moe-router-load-balancing-type none --moe-aux-loss-coeff 1e-3",
            "works: --moe-router-load-balancing-type seq_aux_loss, or --moe-aux-loss-coeff 0",
            f"{EXPERTS} --moe-router-load-balancing-type none --moe-aux-loss-coeff 0",
        ),
        (
            f"{EXPERTS} --moe-router-bias-update-rate 0.1",
            "without biases of experts",
            f"{SIGMOID} --moe-router-bias-update-rate 0.1 --moe-router-enable-expert-bias",
        ),
        (
            f"{EXPERTS} --moe-router-enable-expert-bias",
            "needs sigmoid scores.*works: --moe-router-score-function sigmoid with it",
            f"{SIGMOID} --moe-router-enable-expert-bias",
        ),
        # what stands beside experts
        (f"{EXPERTS} {TP}", "needs sequence parallelism", f"{EXPERTS} {TP} --sequence-parallel"),
        (f"{EXPERTS} --mlp-tile-size 64", "compute all tokens of a rank at once", EXPERTS),
        (
            f"{EXPERTS} --moe-shared-expert-gate",
            "without a shared expert",
            f"{EXPERTS} --moe-shared-expert-gate --moe-shared-expert-intermediate-size 64",
        ),
        (
            f"{EXPERTS} {TP} --sequence-parallel --moe-shared-expert-intermediate-size 63",
            "must be divisible by --tensor-parallel-size 2 .works: 62, 64",
            f"{EXPERTS} {TP} --sequence-parallel --moe-shared-expert-intermediate-size 64",
        ),
    ],
)
def test_a_contradiction_is_refused(words: str, told: str, works: str) -> None:
    assert re.search(told, str(refusal(words)))
    planned(works)


@pytest.mark.parametrize("name", [name for name in settings() if name.startswith("moe_")])
def test_without_experts_no_flag_about_them_has_an_effect(name: str) -> None:
    row = settings()[name]
    value = "" if row.kind == "bool" else row.choices[0] if row.choices else "1"
    error = refusal(f"{row.flag} {value}")
    assert (error.flag, error.works) == (row.flag, "--num-experts 8 with it")
    assert error.rule == "has no effect without --num-experts"


def test_ranks_share_experts_inside_a_copy_of_the_model() -> None:
    assert planned(f"{EXPERTS} {EP} 4").grid.world_size == 4
    assert planned(f"{EXPERTS} {EP} 4 {TP} --sequence-parallel").grid.world_size == 4
    two = f"{EXPERTS} {EP} 4 --data-parallel-replicate-size 2"
    assert planned(f"{two} --global-batch-size 8").grid.world_size == 8
    told = refusal(f"{EXPERTS} {EP} 4", world_size=6)
    assert told.rule == "must divide 6, the number of ranks of a copy of the model"
    assert told.works == "2, or 4 ranks"
    assert refusal(two, world_size=4).works == "2, or 8 ranks"


def test_a_dense_width_that_no_layer_has_need_not_be_divisible() -> None:
    planned(f"{EXPERTS} {TP} --sequence-parallel --ffn-hidden-size 63 --moe-ffn-hidden-size 63")
    words = f"{EXPERTS} {TP} --sequence-parallel --ffn-hidden-size 63 --moe-layers 1"
    assert refusal(words).flag == "--ffn-hidden-size"


def test_a_dense_width_without_effect_is_noted() -> None:
    words, told = f"{EXPERTS} --ffn-hidden-size 64", "--ffn-hidden-size has no effect"
    assert any(told in note for note in planned(f"{words} --moe-ffn-hidden-size 32").notes)
    for other in (words, f"{words} --moe-ffn-hidden-size 32 --moe-layers 1", EXPERTS):
        assert not any(told in note for note in planned(other).notes)


@pytest.mark.parametrize(
    ("flag", "most"),
    [("moe-aux-loss-coeff", 1000), ("moe-z-loss-coeff", 1000), ("moe-router-bias-update-rate", 1)],
)
def test_factors_are_bounded(flag: str, most: int) -> None:
    words = f"{SIGMOID} --moe-router-enable-expert-bias --{flag}"
    planned(f"{words} {most}")
    with pytest.raises(ConfigError, match=f"at most {most}"):
        planned(f"{words} {most + 1}")


def test_muon_goes_with_experts() -> None:
    assert planned(f"{EXPERTS} --optimizer muon {EP} 2").config.optimizer.optimizer == "muon"


def test_one_gate_has_one_function() -> None:
    gates = ("--swiglu", "--geglu", "--quick-geglu")
    for first, second in pairwise(gates):
        told = refusal(f"{first} {second} {'--no-swiglu' if first != '--swiglu' else ''}")
        assert (told.flag, told.rule.partition(":")[0]) == (second, f"contradicts {first}")
    told = refusal("--no-swiglu --activation-func-clamp-value 7")
    assert told.rule == "has no effect without a gate in the MLP"
    planned("--quick-geglu --no-swiglu --activation-func-clamp-value 7 --glu-linear-offset 1")
