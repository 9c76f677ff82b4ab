"""The ranks of a program claim a folder together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch.distributed as dist

from cp_megatron.checkpoint.claim_folder import Choice, claimed_folder
from cp_megatron.checkpoint.hf_folder import new_folder
from cp_megatron.config.files.folder_lock import FolderLock
from cp_megatron.config.files.lock_holder import LOCK_FILE
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.save_and_load import fresh_run_folder
from tests.ranks import run_ranks


def claimed(
    choose: Callable[[], Choice], check: Callable[[], None] = lambda: None
) -> AbstractContextManager[tuple[Path, str]]:
    return claimed_folder(choose, check, flag="--save", again=False, group=None)


def claim(rank: int, world_size: int, folder: Path) -> str:
    """The error of a claim, or what the folder contains meanwhile."""
    try:
        with claimed(lambda: (folder, False)) as (found, note):
            assert (found, note) == (folder, "")
            names = [path.name for path in folder.iterdir()]
            dist.barrier()  # the first rank removes the lock
            return " ".join(names)
    except ConfigError as error:
        return str(error)


def test_all_ranks_are_refused_or_none(tmp_path: Path) -> None:
    assert run_ranks(claim, 2, tmp_path / "run") == [LOCK_FILE] * 2
    assert not (tmp_path / "run").exists()
    lock = FolderLock(tmp_path / "run", flag="--save")
    lock.acquire()
    one, other = run_ranks(claim, 2, tmp_path / "run")
    lock.release()
    assert one == other
    assert one.startswith(f"--save {tmp_path / 'run'}: process ")


def test_a_folder_that_must_be_new_is_chosen_again_if_another_program_was_faster(
    tmp_path: Path,
) -> None:
    def choices() -> Iterator[Choice]:
        yield tmp_path / "toy-1", True  # it did not exist a moment ago
        while True:
            yield fresh_run_folder(tmp_path, "toy"), True

    (tmp_path / "toy-1").mkdir()
    with claimed(choices().__next__) as (folder, _):
        assert folder == tmp_path / "toy-2"
        with claimed(choices().__next__) as (other, _):
            assert other == tmp_path / "toy-3"
    assert [path.name for path in tmp_path.iterdir()] == ["toy-1"]


def test_the_content_is_checked_when_nobody_else_can_change_it(tmp_path: Path) -> None:
    def check() -> None:
        assert (tmp_path / "run" / LOCK_FILE).exists()
        raise ConfigError("--save", "run", "has changed")

    with (
        pytest.raises(ConfigError, match="has changed"),
        claimed(lambda: (tmp_path / "run", False), check),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_two_programs_do_not_write_one_folder(tmp_path: Path) -> None:
    left = tmp_path / "out.tmp" / "deep" / "left-over"
    left.mkdir(parents=True)
    with new_folder(tmp_path / "out") as folder:
        (folder / "mine").touch()
        with (
            pytest.raises(ConfigError, match=f"--output {tmp_path / 'out'}: process "),
            new_folder(tmp_path / "out"),
        ):
            pass
        assert (folder / "mine").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
