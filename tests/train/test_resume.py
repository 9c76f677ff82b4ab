"""Resuming: --load auto, the newest intact checkpoint, and saves that fail during training."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from cp_megatron.checkpoint import save as saving
from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.errors import ConfigError, FinishedError
from cp_megatron.preflight.check import check
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers
from tests.train.test_loop import STEPS, Place, StoppingView, assembled, finish, place

__all__ = ["place"]  # the fixture
EVERY = ["--save-interval", "1"]


def train(
    rank: int, world_size: int, argv: list[str], stop_at: int | None = None, again: bool = False
) -> tuple[int, int, list[str]]:
    """First and last step, and the notes of the start table."""
    run = assembled(rank, world_size, argv, again)
    return run.plan.load_step, finish(run, StoppingView(stop_at)), list(run.plan.notes)


def refused(rank: int, world_size: int, argv: list[str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        assembled(rank, world_size, argv)
    return caught.value


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_trained_again(place: Place) -> None:
    grid = ["--context-parallel-size", "2"]
    run_ranks(train, 2, place.argv("whole", *grid))
    run_ranks(train, 2, place.argv("cut", *grid, *EVERY), 3)
    cut, whole = place.folder / "cut", place.folder / "whole"
    flip(cut / "step-3" / "rank-00001.safetensors")
    flip(cut / "step-2" / "manifest.json")
    for first, last, notes in run_ranks(train, 2, place.load("cut")):
        assert (first, last) == (1, STEPS)
        (note,) = (note for note in notes if "step-3" in note)
        assert "is passed over: it rank-00001.safetensors is damaged" in note
        assert "kept as step-3.damaged" in note
        assert any("step-2 is passed over: it manifest.json" in note for note in notes)
    assert (cut / "step-3.damaged" / "manifest.json").is_file()
    assert (cut / "step-2.damaged").is_dir()
    assert differing(whole / f"step-{STEPS}", cut / f"step-{STEPS}") == []
    assert list(map(numbers, metrics_of(whole))) == list(map(numbers, metrics_of(cut)))


def test_a_named_step_that_is_damaged_is_refused(place: Place) -> None:
    run_ranks(train, 1, place.argv("run", *EVERY), 2)
    flip(place.folder / "run" / "step-2" / "rank-00000.safetensors")
    argv = ["--load", place.run("run/step-2"), "--save", place.run("other")]
    (error,) = run_ranks(refused, 1, argv)
    assert "is damaged" in error.rule
    assert error.works == place.run("run/step-1")
    # From another folder's run nothing is renamed.
    argv = ["--load", place.run("run"), "--save", place.run("other")]
    ((first, _, notes),) = run_ranks(train, 1, argv)
    assert first == 1
    assert any(note.endswith("SHA-256 differs from the manifest") for note in notes)
    assert (place.folder / "run" / "step-2").is_dir()


def test_a_run_without_a_whole_checkpoint_is_refused_and_not_overwritten(place: Place) -> None:
    run_ranks(train, 1, place.argv("run"), 2)
    flip(place.folder / "run" / "step-2" / "rank-00000.safetensors")
    for argv in (place.load("run"), place.argv("run", "--load", "auto")):
        (error,) = run_ranks(refused, 1, argv)
        assert "rank-00000.safetensors is damaged" in error.rule
    (place.folder / "run" / "step-2" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="is not a finished checkpoint"):
        assembled(0, 1, place.argv("run", "--load", "auto"))


@pytest.mark.parametrize("load", ["auto", "run"])
def test_the_same_command_starts_a_run_and_continues_it(place: Place, load: str) -> None:
    """Also in Megatron's words, in which both flags name the folder."""
    grid = ["--context-parallel-size", "2"]
    flags = ["--load", load if load == "auto" else place.run(load), *grid]
    run_ranks(train, 2, place.argv("whole", *grid))
    first, last, notes = run_ranks(train, 2, place.argv("run", *flags), 2)[0]
    assert (first, last) == (0, 2)
    assert notes == [f"{place.run('run')} holds no checkpoint yet: a new run begins"]
    assert run_ranks(train, 2, place.argv("run", *flags))[0] == (2, STEPS, [])
    one, other = place.folder / "whole", place.folder / "run"
    assert differing(one / f"step-{STEPS}", other / f"step-{STEPS}") == []
    run_again = parse_arguments(place.argv("run", *flags))
    with pytest.raises(FinishedError, match=f"already at step {STEPS}"):
        check(run_again.config, Launch(world_size=2), given=run_again.given, auto=run_again.auto)
    with pytest.raises(ConfigError, match="--load auto --save RUN"):
        parse_arguments(["--load", "auto"])


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(place: Place) -> None:
    run_ranks(train, 1, place.argv("run"), 2)
    folder = place.folder / "run"
    (folder / "step-2").rename(folder / "step-2.tmp")
    (error,) = run_ranks(refused, 1, place.argv("run"))
    assert "is not empty" in error.rule
    assert run_ranks(train, 1, place.argv("run", "--load", "auto"))[0][:2] == (0, STEPS)
    assert [row["step"] for row in metrics_of(folder)] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in folder.glob("step-*")) == [f"step-{STEPS}"]


def test_ranks_that_their_launcher_restarts_continue(place: Place) -> None:
    """Without --load, and from the folder of --save even if --load names another one."""
    run_ranks(train, 1, place.argv("run"), 2)
    assert run_ranks(train, 1, place.argv("run"), None, True)[0][:2] == (2, STEPS)
    words = ["--load", place.run("run/step-2"), "--save", place.run("on"), "--train-iters", "6"]
    assert run_ranks(train, 1, words, 4)[0][:2] == (2, 4)
    assert run_ranks(train, 1, words, None, True)[0][:2] == (4, 6)


def full_disk(rank: int, world_size: int, argv: list[str], good: int) -> tuple[list[str], str]:
    """The printed lines and the final error if all saves but the first ``good`` fail."""
    run = assembled(rank, world_size, argv)
    said: list[str] = []
    run.saver._say = said.append
    count = 0
    write = saving.write_image

    def full(*args: object) -> object:
        nonlocal count
        count += 1
        if count > good and rank == 1:
            raise OSError(28, "No space left on device")
        return write(*args)  # type: ignore[arg-type]

    error = ""
    with mock.patch.object(saving, "write_image", full):
        try:
            finish(run)
        except ConfigError as refused:
            error = refused.rule
    return said, error


@pytest.mark.parametrize("flags", [[], ["--no-async-save"]])
def test_a_full_disk_is_a_warning_but_the_last_save_must_succeed(
    place: Place, flags: list[str]
) -> None:
    argv = place.argv("run", "--context-parallel-size", "2", *EVERY, *flags)
    for said, error in run_ranks(full_disk, 2, argv, 1):
        assert error == "rank 1: No space left on device"
        first, second = said
        assert first == (
            "warning: no checkpoint of step 2 (rank 1: No space left on device); "
            "the newest is of step 1"
        )
        assert second.startswith("warning: no checkpoint of step 3 ")
    assert [path.name for path in (place.folder / "run").glob("step-*")] == ["step-1"]


def test_only_the_newest_checkpoints_stay(place: Place) -> None:
    keep = ["--keep-latest-k", "1", "--save-retain-interval", "2", *EVERY]
    run_ranks(train, 2, place.argv("run", "--context-parallel-size", "2", *keep), 3)
    names = sorted(path.name for path in (place.folder / "run").glob("step-*"))
    assert names == ["step-2", "step-3"]
    with pytest.raises(ConfigError, match="has no effect unless --keep-latest-k is set"):
        assembled(0, 1, place.argv("other", "--save-retain-interval", "2"))


def differ(rank: int, world_size: int, argvs: list[list[str]]) -> ConfigError:
    return refused(rank, world_size, argvs[rank])


def test_ranks_that_see_other_checkpoints_end_alike(place: Place) -> None:
    run_ranks(train, 2, place.argv("run", "--context-parallel-size", "2", *EVERY), 2)
    save = ["--save", place.run("other")]
    argvs = [["--load", place.run(f"run/step-{step}"), *save] for step in (1, 2)]
    one, other = run_ranks(differ, 2, argvs)
    assert one.rule == other.rule
    assert one.rule.startswith("ranks [1] see ")
