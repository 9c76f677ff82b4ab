"""How this process was started, according to the variables."""

from __future__ import annotations

import pytest

from cp_megatron.comm.runtime import Launch
from cp_megatron.errors import ConfigError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_plain_python_is_one_rank() -> None:
    assert Launch.from_environment({}) == Launch()
    assert not Launch.from_environment({"WORLD_SIZE": "8"}).under_torchrun


def test_torchrun() -> None:
    launch = Launch.from_environment(TORCHRUN)
    expected = Launch(rank=5, local_rank=1, world_size=8, local_world_size=4, under_torchrun=True)
    assert launch == expected
    assert launch.nodes == 2


def test_a_launcher_that_sets_two_variables_runs_on_one_node() -> None:
    launch = Launch.from_environment({"RANK": "3", "WORLD_SIZE": "4"})
    assert (launch.local_rank, launch.local_world_size, launch.nodes) == (3, 4, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "-1"),
        ("RANK", "one"),
        ("RANK", "8"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", ""),
        ("WORLD_SIZE", "9" * 5000),
        ("LOCAL_RANK", "4"),
        ("LOCAL_WORLD_SIZE", "0"),
    ],
)
def test_impossible_numbers_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Launch.from_environment({**TORCHRUN, name: value})
    assert caught.value.flag == name
