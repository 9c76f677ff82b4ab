"""A folder has one writer: among many that start at once, after a kill, and from other machines."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.config.files import folder_lock
from cp_megatron.config.files.folder_lock import FolderLock, refuse_held
from cp_megatron.config.files.lock_holder import GONE_SECONDS, LOCK_FILE, parent_mark
from cp_megatron.errors import ConfigError

RACERS, ROUNDS = 6, 12


def lock_of(folder: Path, **options: Any) -> FolderLock:
    return FolderLock(folder, flag="--save", **options)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[FolderLock]:
    lock = lock_of(tmp_path / "run")
    lock.acquire()
    yield lock
    lock.release()


def refuse_call(*_: object) -> None:
    raise OSError(95, "Operation not supported")


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        lock_of(folder, **options).acquire()
    return str(caught.value)


def test_the_second_writer_is_told_who_the_first_one_is(held: FolderLock) -> None:
    for error in (refused(held.folder), refused(held.folder)):
        assert error.startswith(f"--save {held.folder}: process {os.getpid()} on {os.uname()[1]} ")
        assert time.strftime(" since %Y-") in error
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        refuse_held("--save", held.folder)
    assert [path.name for path in held.folder.iterdir()] == [LOCK_FILE]
    held.release()
    refuse_held("--save", held.folder)
    again = lock_of(held.folder)
    again.acquire()
    again.release()


def test_a_folder_that_holds_nothing_else_goes_with_its_lock(tmp_path: Path) -> None:
    lock = lock_of(tmp_path / "runs" / "one")
    lock.acquire()
    lock.release()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    lock = lock_of(tmp_path / "mine")
    lock.acquire()
    lock.release()
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_new_folder_has_one_maker(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(FileExistsError):
        lock_of(tmp_path / "one").acquire(new=True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in refused(tmp_path / "file" / "run")


def test_a_full_disk_leaves_no_half_written_lock(tmp_path: Path) -> None:
    """A limit on the size of files takes the place of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        assert "cannot be written: File too large" in refused(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def written_by(lock: FolderLock, **changes: object) -> None:
    """Replaces the words in a lock, as another holder would have written them."""
    path = lock.folder / LOCK_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def another(folder: Path, **changes: object) -> Path:
    """The lock of another process, which wrote ``changes`` into it."""
    lock = lock_of(folder)
    lock.acquire()
    written_by(lock, token="theirs", **changes)
    lock._released.set()
    os.close(lock._fd)
    return folder / LOCK_FILE


def test_a_recycled_process_number_is_not_its_holder(tmp_path: Path) -> None:
    another(tmp_path / "run", pid=1, started=-1)
    lock = lock_of(tmp_path / "run")
    lock.acquire()
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_the_lock_of_another_user_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may be writable for a group, while the file of the lock is not."""
    path = another(tmp_path / "run", started=-1)
    opened = os.open

    def refuse_writing(file: Path, flags: int, *mode: int) -> int:
        if file == path and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(file, flags, *mode)

    monkeypatch.setattr(os, "open", refuse_writing)
    monkeypatch.setattr(os, "access", lambda file, mode: False)
    lock = lock_of(tmp_path / "run")
    lock.acquire()
    lock.release()


def test_another_machine_is_judged_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_PAUSE", 0.01)
    path = another(tmp_path / "run", host="node7", machine="another", pid=12)
    error = refused(tmp_path / "run")
    assert "process 12 on node7 writes" in error
    assert "if that process is gone, wait 3 minutes" in error
    old = time.time() - GONE_SECONDS - 1
    os.utime(path, (old, old))
    refuse_held("--save", tmp_path / "run")
    lock = lock_of(tmp_path / "run")
    lock.acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_scheduler_waits_for_a_holder_elsewhere_that_may_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder_lock, "_PAUSE", 0.02)
    path = another(tmp_path / "run", host="node7", machine="another", pid=12)
    old = time.time() - GONE_SECONDS + 0.3
    os.utime(path, (old, old))
    refuse_held("--save", tmp_path / "run", waits=True)
    refused(tmp_path / "run")
    lock = lock_of(tmp_path / "run", waits=True)
    lock.acquire()
    assert time.time() > old + GONE_SECONDS
    assert "process 12 on node7 a moment ago; waiting up to 3" in capsys.readouterr().err
    lock.release()


def test_a_sign_of_life_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = another(tmp_path / "run", host="node7", machine="another", pid=12)

    def passes(_: float) -> None:
        os.utime(path)

    monkeypatch.setattr(time, "sleep", passes)
    assert "process 12 on node7 writes" in refused(tmp_path / "run", waits=True)
    assert path.exists()


def test_a_lock_that_changed_its_holder_is_not_removed(held: FolderLock) -> None:
    """Between the judgement of a process and its removal of the lock."""
    judged = replace(held._me, machine="another", token="gone")
    held._remove(judged)
    assert held._is_ours()


def test_ranks_that_their_launcher_starts_again_have_their_own_lock(tmp_path: Path) -> None:
    """Also if the first rank is on another machine now."""
    mark = parent_mark()
    another(tmp_path / "run", machine="another", launchers=["one", mark])
    refused(tmp_path / "run", launchers=[mark])
    refused(tmp_path / "run", launchers=["three"], again=True)
    lock = lock_of(tmp_path / "run", launchers=[mark], again=True)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("words", ["", "{}", "[1]", '{"host": 1}'])
def test_an_unreadable_lock_is_respected_until_it_is_old(tmp_path: Path, words: str) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(words)
    assert refused(tmp_path).endswith(f"if no process does, remove {path})")
    os.utime(path, (1, 1))
    refuse_held("--save", tmp_path)


def test_a_live_holder_refreshes_and_notices_that_it_lost_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.02)
    lost: list[ConfigError] = []
    monkeypatch.setattr(folder_lock, "_leave", lost.append)
    lock = lock_of(tmp_path / "run")
    lock.acquire()
    path = tmp_path / "run" / LOCK_FILE
    os.utime(path, (1, 1))
    wait_until(lambda: path.stat().st_mtime > 1)
    theirs = json.dumps({**json.loads(path.read_text()), "token": "theirs", "pid": 77})
    path.with_suffix(".new").write_text(theirs)
    path.with_suffix(".new").replace(path)
    wait_until(lambda: bool(lost))
    assert "process 77 on" in str(lost[0])
    lock.release()
    assert path.exists(), "it is theirs"


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("missing", ["flock", "link"])
def test_a_file_system_without_locks_or_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(fcntl if missing == "flock" else os, missing, refuse_call)
    lock = lock_of(tmp_path / "run")
    lock.acquire()
    refused(tmp_path / "run")
    lock.release()
    another(tmp_path / "two", started=-1)
    lock = lock_of(tmp_path / "two")
    lock.acquire()
    lock.release()
    assert list((tmp_path / "two").iterdir()) == []


def test_a_lock_without_signs_of_life_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "utime", refuse_call)
    lock = lock_of(tmp_path / "run")
    lock.acquire()
    assert "takes it for abandoned after 3 minutes" in lock.note
    lock.release()


HOLDER = """
import sys
from pathlib import Path
from cp_megatron.config.files.folder_lock import FolderLock
FolderLock(Path(sys.argv[1]), flag="--save").acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=pipe, stdout=pipe
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert f"process {holder.pid} on" in refused(tmp_path)
        holder.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # now it is a zombie
        lock = lock_of(tmp_path)
        lock.acquire()
        lock.release()


def line_of(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline()


RACER = """
import random, sys, time
from pathlib import Path
from cp_megatron.config.files.folder_lock import FolderLock
from cp_megatron.errors import ConfigError
remove = FolderLock._remove
FolderLock._remove = lambda *args: (time.sleep(random.random() / 50), remove(*args))[1]
root, rounds = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
start, won = float(sys.stdin.readline()), []
for number in range(rounds):
    while time.time() < start + 0.05 * number:
        pass
    try:
        FolderLock(root / str(number), flag="--save").acquire()
        won.append(number)
    except ConfigError as error:
        assert "writes into this folder" in str(error), error
print(*won, flush=True)
sys.stdin.read()
"""


def test_of_many_that_start_at_once_exactly_one_wins(tmp_path: Path) -> None:
    """In every other folder lies the lock of a process that is gone. Each racer hesitates between
    its judgement and the take-over, in which time another one may have taken over."""
    for number in range(0, ROUNDS, 2):
        another(tmp_path / str(number), started=-1)
    words = [sys.executable, "-c", RACER, str(tmp_path), str(ROUNDS)]
    pipe = subprocess.PIPE
    racers = [
        subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        for _ in range(RACERS)
    ]
    try:
        for racer in racers:
            assert line_of(racer) == "ready\n"
        start = time.time() + 0.1
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(f"{start}\n")
        won = [number for racer in racers for number in line_of(racer).split()]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert sorted(map(int, won)) == list(range(ROUNDS))
