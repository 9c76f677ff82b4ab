"""Runs on blends, packed rows and conversations: resumed bit for bit, the same on every grid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cp_megatron.errors import ConfigError
from tests.data.ranges import write_pair
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers
from tests.train.test_loop import BASE, STEPS, STOP, train

CP2 = ["--context-parallel-size", "2"]


@pytest.fixture
def blend(tmp_path: Path) -> list[str]:
    """The flags of a packed blend of two datasets."""
    for name, seed in (("a", 0), ("b", 1)):
        random = np.random.default_rng(seed)
        lengths = random.lognormal(3.2, 0.8, 80).astype(int) + 1
        documents = [random.integers(97, 105 + 10 * seed, length).tolist() for length in lengths]
        write_pair(tmp_path / name, ([*tokens, 256] for tokens in documents))
    paths = ["--data-path", "0.7", str(tmp_path / "a"), "0.3", str(tmp_path / "b")]
    return [*BASE, "--seq-length", "64", "--dtype", "float64", *paths, "--packing", "best-fit"]


def test_a_packed_blend_goes_on_bit_for_bit(blend: list[str], tmp_path: Path) -> None:
    one, other = tmp_path / "whole", tmp_path / "cut"
    assert run_ranks(train, 2, [*blend, *CP2, "--save", str(one)]) == [STEPS] * 2
    assert run_ranks(train, 2, [*blend, *CP2, "--save", str(other)], STOP) == [STOP] * 2
    assert run_ranks(train, 2, ["--load", str(other)]) == [STEPS] * 2
    assert differing(one / f"step-{STEPS}", other / f"step-{STEPS}") == []
    assert list(map(numbers, metrics_of(one))) == list(map(numbers, metrics_of(other)))


def refused(rank: int, world_size: int, argv: list[str]) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        train(rank, world_size, argv)
    return caught.value.flag, caught.value.rule


def test_other_weights_are_other_data(blend: list[str], tmp_path: Path) -> None:
    run_ranks(train, 1, [*blend, "--save", str(tmp_path / "run")], STOP)
    at = blend.index("--data-path")
    paths = [*blend[at : at + 1], "0.5", blend[at + 2], "0.5", blend[at + 4]]
    ((flag, rule),) = run_ranks(refused, 1, ["--load", str(tmp_path / "run"), *paths])
    assert flag == "--data-path"
    assert "is not the data" in rule


def test_conversations_train_alike_on_two_ranks(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    talks = [[("user", "q" * (n % 9)), ("assistant", "a" * (n % 13))] for n in range(1, 60)]
    lines = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks]
    path.write_text("\n".join(map(json.dumps, lines)))
    flags = [*BASE, "--seq-length", "96", "--dtype", "float64", "--sft", "--data-path", str(path)]
    run_ranks(train, 1, [*flags, "--save", str(tmp_path / "one")])
    run_ranks(train, 2, [*flags, *CP2, "--save", str(tmp_path / "two")])
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-10)
    assert one[-1]["valid_loss"] == pytest.approx(two[-1]["valid_loss"], rel=1e-10)
