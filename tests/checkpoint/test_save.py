"""Saves while training continues: they store the copied values, and can be killed at any time."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cp_megatron.checkpoint import save as saving
from cp_megatron.checkpoint.find_checkpoint import newest_intact
from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.manifest import read_manifest, verify_files
from cp_megatron.checkpoint.save import Retention, Save, start_save
from cp_megatron.checkpoint.shard_writer import (
    DIRECT_BYTES,
    DTYPES,
    HostMemory,
    take_image,
    write_all,
    write_image,
    write_text,
)
from cp_megatron.checkpoint.step_folders import finished_steps, set_aside
from cp_megatron.config import Config
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid
from tests.checkpoint import toy
from tests.ranks import run_ranks


def start(folder: Path, model: toy.Toy, optimizer: torch.optim.AdamW, **other: Any) -> Save:
    facts = {"step": 3, "consumed": 24, "config": Config(), "grid": Grid()}
    facts |= {"data_fingerprint": "abc", "vocab_size": 257}
    return start_save(folder, model=model, optimizer=optimizer, **(facts | other))


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {
        name: torch.randint(0, 2, (2, 3)).to(dtype) for name, dtype in sorted(DTYPES.items())
    }
    tensors |= {"scalar": torch.tensor(2.5), "é": torch.arange(6).reshape(3, 2).t()}
    entry = write_image(tmp_path / "shard", take_image(tensors, HostMemory()))
    found = load_file(tmp_path / "shard")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert entry.size == (tmp_path / "shard").stat().st_size
    with pytest.raises(FileExistsError):
        write_image(tmp_path / "shard", take_image(tensors, HostMemory()))


def test_partial_writes_are_continued(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    whole = os.write
    with mock.patch.object(os, "write", lambda fd, data: whole(fd, data[:3])):
        write_all(descriptor, memoryview(b"0123456789"))
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("most", [1 << 30, 3 << 12, (1 << 20) + 7])
def test_a_large_file_is_written_with_partial_direct_writes(tmp_path: Path, most: int) -> None:
    size = DIRECT_BYTES + 4096 * 3 + 5
    tensors = {"large": torch.randint(0, 256, (size,), dtype=torch.uint8)}
    whole, taken = os.write, list[int]()

    def write(descriptor: int, data: memoryview) -> int:
        taken.append(whole(descriptor, data[:most]))
        return taken[-1]

    with mock.patch.object(os, "write", write):
        entry = write_image(tmp_path / "shard", take_image(tensors, HostMemory()))
    assert sum(taken) == entry.size == (tmp_path / "shard").stat().st_size
    assert torch.equal(load_file(tmp_path / "shard")["large"], tensors["large"])
    assert entry.sha256 == sha256((tmp_path / "shard").read_bytes()).hexdigest()


def test_memory_is_aligned_and_reused() -> None:
    for size in (1, 5000, 1 << 20):
        memory = HostMemory()
        taken = memory.take(size, pinned=False)
        assert taken.numel() == size
        assert taken.data_ptr() % 4096 == 0
        assert memory.take(size - 1 or 1, pinned=False).data_ptr() == taken.data_ptr()
        assert memory.take(size + 9000, pinned=False).numel() == size + 9000


class Gate:
    """Blocks every thread that writes a shard until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self._write = write_image

    def __call__(self, *args: Any) -> Any:
        assert self.opened.wait(30)
        return self._write(*args)


def train_on(rank: int, world_size: int, folder: Path) -> list[bool]:
    """Updates the model while the save waits; the values before the update are saved."""
    model, optimizer = toy.make(Grid(cp=2, tp=2), updates=3)
    expected = toy.snapshot(model, optimizer)
    gate = Gate()
    with mock.patch.object(saving, "write_image", gate):
        save = start(folder, model, optimizer, grid=Grid(cp=2, tp=2))
        toy.update(model, optimizer, 2)
        waited = not save.ended and not (folder / "step-3").exists()
        gate.opened.set()
        save.wait()
    changed = not torch.equal(toy.snapshot(model, optimizer)["row"], expected["row"])
    other, its_optimizer = toy.make(Grid(cp=2, tp=2))
    load_checkpoint(folder / "step-3", model=other, optimizer=its_optimizer)
    found = toy.snapshot(other, its_optimizer)
    same = all(torch.equal(found[name], expected[name]) for name in expected)
    return [waited, changed, same, save.ended, 0 < save.stopped_seconds < save.seconds]


def test_training_continues_during_a_save(tmp_path: Path) -> None:
    assert run_ranks(train_on, 4, tmp_path) == [[True] * 5] * 4


def fail_to_copy(rank: int, world_size: int, folder: Path) -> str:
    model, optimizer = toy.make(Grid(cp=2), updates=1)
    failing = mock.Mock(side_effect=MemoryError("no memory for the copy"))
    with mock.patch.object(saving, "take_image", failing if rank else take_image):
        save = start(folder, model, optimizer, grid=Grid(cp=2))
    with pytest.raises(MemoryError) as caught:
        save.wait()
    return f"{caught.value} {sorted(path.name for path in folder.iterdir())}"


def test_a_rank_that_cannot_copy_fails_the_save_on_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(fail_to_copy, 2, tmp_path) == ["no memory for the copy []"] * 2


@given(st.sets(st.integers(0, 60)), st.none() | st.integers(1, 5), st.none() | st.integers(1, 7))
def test_which_older_checkpoints_are_kept(
    steps: set[int], latest: int | None, every: int | None
) -> None:
    removed = Retention(latest=latest, every=every).superseded(sorted(steps))
    kept = steps - set(removed)
    assert kept >= set(sorted(steps)[-(latest or len(steps) or 1) :])
    assert kept >= {step for step in steps if every and step % every == 0}
    if latest is not None:
        assert len({s for s in kept if not every or s % every}) <= latest


def test_older_checkpoints_are_removed_when_the_new_one_is_complete(tmp_path: Path) -> None:
    model, optimizer = toy.make(None, updates=1)
    for step in range(1, 8):
        start(tmp_path, model, optimizer, step=step, retention=Retention(latest=2, every=3)).wait()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-3", "step-6", "step-7"]


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """The kernel refuses to write files that are longer than a limit; Python raises OSError."""
    model, optimizer = toy.make(None, updates=1)
    start(tmp_path, model, optimizer, step=1).wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ConfigError, match="rank 0: File too large"):
            start(tmp_path, model, optimizer, step=2).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    start(tmp_path, model, optimizer, step=2).wait()
    assert sorted(finished_steps(tmp_path)) == [1, 2]


CALLS = ("open", "write", "fsync", "close", "rename", "mkdir", "rmdir", "unlink")
"""The system calls of a save; the process may be killed at each of them."""

VICTIM = """
import os, signal, sys
from pathlib import Path
folder, last = Path(sys.argv[1]), int(sys.argv[2])
from tests.checkpoint import toy
from tests.checkpoint.test_save import CALLS, start
from cp_megatron.checkpoint import shard_writer
from cp_megatron.checkpoint.save import Retention
model, optimizer = toy.make(None, updates=1)
count = 0
def watched(call):
    def wrapper(*args, **more):
        global count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **more)
    return wrapper
start(folder, model, optimizer, step=1).wait()
start(folder, model, optimizer, step=2).wait()
toy.update(model, optimizer, 1)
shard_writer.PIECE_BYTES = 500  # several writes
for name in CALLS:
    setattr(os, name, watched(getattr(os, name)))
start(folder, model, optimizer, step=4, retention=Retention(latest=2)).wait()
print(count, flush=True)
os._exit(0)
"""


def fork_victims(folder: Path, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Forks children that are killed at call ``first`` to ``last``; yields (call, exit status)."""
    for number in range(first, last + 1):
        child = os.fork()
        if not child:
            sys.argv = ["victim", str(folder / str(number)), str(number)]
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
            exec(VICTIM, {})
        yield number, os.waitpid(child, 0)[1]


KILLER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import tests.checkpoint.test_save as tests
folder = Path(sys.argv[1])
number, status = 0, 9
while status == 9:
    number += 1
    ((_, status),) = tests.fork_victims(folder, number, number)
print(number, status)
"""


def test_a_save_killed_at_any_system_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Steps 1 and 2 exist. The save of step 4, which would remove step 1, is killed."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    number, status = map(int, ended.stdout.split())
    assert status == 0, "the last one was not killed"
    assert number > 25
    chosen = []
    for point in range(1, number + 1):
        found = newest_intact(tmp_path / str(point))
        assert found is not None
        assert not found.passed_over, point
        verify_files(found.folder, found.manifest)
        model, optimizer = toy.make(None)
        load_checkpoint(found.folder, model=model, optimizer=optimizer)
        chosen.append(found.manifest.step)
        start(tmp_path / str(point), model, optimizer, step=5).wait()
        assert not list((tmp_path / str(point)).glob("*.tmp")), (
            "the next save removes unfinished ones"
        )
    assert set(chosen) == {2, 4}
    assert chosen == sorted(chosen), "step 4 is chosen from one call on"
    print(f"{number - 1} points: step 2 chosen {chosen.count(2)} times, step 4 {chosen.count(4)}")


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    """Flips 200 bits in the files of the newest step; the error suggests the step before."""
    model, optimizer = toy.make(None, updates=1)
    for step in (1, 2):
        start(tmp_path, model, optimizer, step=step).wait()
    files = sorted((tmp_path / "step-2").iterdir())
    assert [file.name for file in files] == ["manifest.json", "rank-00000.safetensors"]
    generator = torch.Generator().manual_seed(5)
    found = 0
    for number in range(200):
        file = files[number % len(files)]
        good = file.read_bytes()
        place = int(torch.randint(8 * len(good), (), generator=generator))
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        found += not is_whole(tmp_path / "step-2", file.name)
        file.write_bytes(good)
    assert found == 200
    assert is_whole(tmp_path / "step-2", "")


def is_whole(step: Path, broken: str) -> bool:
    try:
        verify_files(step, read_manifest(step))
    except ConfigError as error:
        return not (broken in error.rule and str(step.with_name("step-1")) in error.works)
    return True


def slow_disk(rank: int, world_size: int, folder: Path) -> list[str]:
    """Rank 1's disk fails after a second; every rank raises the error and can save again."""
    model, optimizer = toy.make(Grid(cp=2), updates=1)

    def late(*args: Any) -> Any:
        time.sleep(1)
        raise OSError(5, "Input/output error")

    with mock.patch.object(saving, "write_image", late if rank else write_image):
        save = start(folder, model, optimizer, grid=Grid(cp=2))
        at_once = save.stopped_seconds < 1
        with pytest.raises(ConfigError) as caught:
            save.wait()
    again = start(folder, model, optimizer, grid=Grid(cp=2)).wait()
    return [str(at_once), caught.value.rule, again.name]


def test_a_slow_disk_that_fails_is_reported_on_all_ranks(tmp_path: Path) -> None:
    expected = ["True", "rank 1: Input/output error", "step-3"]
    assert run_ranks(slow_disk, 2, tmp_path) == [expected] * 2


def test_a_manifest_is_never_written_over(tmp_path: Path) -> None:
    write_text(tmp_path / "manifest.json", "one")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "manifest.json", "other")


def killed_peer(rank: int, world_size: int, folder: Path) -> None:
    """Saves the same step again, and one rank dies; the checkpoint is not changed."""
    model, optimizer = toy.make(Grid(cp=2), updates=1)
    with pytest.raises(ConfigError, match="step-3 exists already"):
        start(folder, model, optimizer, grid=Grid(cp=2)).wait()
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_step_is_never_saved_over(tmp_path: Path) -> None:
    run_ranks(toy.save_on_ranks, 2, Grid(cp=2), tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "step-3").iterdir()}
    with pytest.raises(RuntimeError, match="rank 1 died"):
        run_ranks(killed_peer, 2, tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "step-3").iterdir()} == before


MOVES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a link": lambda file: (file.rename(file.with_name("x")), file.symlink_to("x")),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


# A manifest may be a link, because its contents are checked.
@pytest.mark.parametrize(
    ("name", "move"),
    [("rank-00000.safetensors", move) for move in MOVES]
    + [("manifest.json", move) for move in MOVES if move != "a link"],
)
def test_a_checkpoint_without_one_of_its_files_is_passed_over(
    name: str, move: str, tmp_path: Path
) -> None:
    model, optimizer = toy.make(None, updates=1)
    for step in (1, 2):
        start(tmp_path, model, optimizer, step=step).wait()
    MOVES[move](tmp_path / "step-2" / name)
    found = newest_intact(tmp_path)
    assert found is not None
    assert found.folder == tmp_path / "step-1"
    assert list(found.passed_over) == [tmp_path / "step-2"]
    assert set_aside(tmp_path / "step-2") == tmp_path / "step-2.damaged"
    start(tmp_path, model, optimizer, step=2).wait()
    assert set_aside(tmp_path / "step-2") == tmp_path / "step-2.damaged.2"
    assert sorted(finished_steps(tmp_path)) == [1]
