"""Weights & Biases: its offline files contain the metrics, and its failures end nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cp_megatron.config import LogConfig
from cp_megatron.metrics import wandb_log
from cp_megatron.metrics.wandb_log import ID_FILE, WandbRun

LOG = LogConfig(wandb_project="test", wandb_exp_name="first")
ROW = {"step": 3, "loss": 2.5, "mfu": None}

# In a process of its own: wandb keeps a program running, and state in the module.
TWO_RUNS = """
import sys
from pathlib import Path
from cp_megatron.config import LogConfig
from cp_megatron.metrics.wandb_log import WandbRun
folder = Path(sys.argv[1])
log = LogConfig(wandb_project="test", wandb_exp_name="first")
for steps in ((1, 2, 3), (2, 3, 4)):
    run = WandbRun(log, folder=folder, settings={"train": {"seed": 7}})
    for step in steps:
        run.write({"step": step, "loss": 10.0 * step, "mfu": None})
    run.close(failed=steps[0] == 2)
    print(run.link)
"""
READ = """
import glob, json, sys
from wandb.proto import wandb_internal_pb2 as protocol

def records(data):
    # LevelDB's log: blocks of 32 KiB, pieces of CRC (4), length (2), kind (1) and bytes; the kinds
    # are whole, first, middle, last. 7 bytes of wandb's own come first.
    place, parts = 7, []
    while place < len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield protocol.Record.FromString(b"".join(parts))
            parts = []

for place in sys.argv[1:]:
    found = {"history": [], "metrics": {}}
    for record in records(open(glob.glob(place + "/*.wandb")[0], "rb").read()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = [record.run.run_id, record.run.project, record.run.display_name]
            found["config"] = {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "metric":
            metric = record.metric
            found["metrics"][metric.name or metric.glob_name] = metric.step_metric
        elif kind == "history":
            items = {(*i.nested_key, i.key)[0]: i.value_json for i in record.history.item}
            found["history"].append({k: json.loads(v) for k, v in items.items() if k[0] != "_"})
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    print(json.dumps(found))
"""


def python(code: str, *words: str) -> list[str]:
    environ = {**os.environ, "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_offline_runs_are_on_the_disk_and_one_goes_on_in_the_other(tmp_path: Path) -> None:
    lines = python(TWO_RUNS, str(tmp_path))
    assert all(line.startswith(f"wandb sync {tmp_path}/wandb/offline-run-") for line in lines)
    places = [line.removeprefix("wandb sync ") for line in lines]
    one, two = (json.loads(line) for line in python(READ, *places))
    kept = json.loads((tmp_path / ID_FILE).read_text())
    assert one["run"] == two["run"] == [kept["/test"], "test", "first"]
    assert one["config"]["train"] == {"seed": 7}
    rows = [{"step": step, "loss": 10.0 * step} for step in range(1, 5)]
    assert (one["history"], two["history"]) == (rows[:3], rows[1:])
    # The counter of wandb cannot go back to step 2, but the metric can.
    assert one["metrics"]["*"] == "step"
    assert (one["exit"], two["exit"]) == (0, 1)


class Fake:
    """A package wandb that fails at a given place."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.given, self.rows = fails, {}, []
        self.hang = threading.Event()
        self.offline, self.url = False, "https://there/run"
        self.settings = SimpleNamespace(sync_dir="somewhere")

    def Settings(self, **settings: Any) -> Any:  # noqa: N802
        return settings

    def init(self, **given: Any) -> Fake:
        self._fail("init")
        self.given = given
        return self

    def define_metric(self, name: str, **how: Any) -> None:
        self._fail("define_metric")

    def log(self, row: dict[str, Any]) -> None:
        self._fail("log")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self._fail("finish")
        if self.fails == "hangs":
            self.hang.wait(30)

    def _fail(self, where: str) -> None:
        if self.fails == where:
            raise OSError(f"{where}:\n  no network")


@pytest.mark.parametrize("fails", ["init", "define_metric", "log", "finish", "hangs"])
def test_whatever_fails_is_one_warning(
    fails: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(wandb_log, "SECONDS_TO_FINISH", 0.05)
    fake = Fake(fails)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = WandbRun(LOG, folder=tmp_path, settings={})
    for _ in range(3):
        run.write(ROW)
    run.close()
    run.close()
    fake.hang.set()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: Weights & Biases ")
    assert len(fake.rows) == (3 if fails in ("finish", "hangs") else 0)
    assert bool(run.link) == (fails not in ("init", "define_metric"))


def test_flags_reach_it_and_each_project_has_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = WandbRun(LOG, folder=tmp_path, settings={"a": 1})
    run.write(ROW)
    assert fake.rows == [{"step": 3, "loss": 2.5}]
    assert run.link == fake.url
    first = fake.given
    assert (first["project"], first["name"], first["entity"]) == ("test", "first", None)
    assert (first["dir"], first["resume"], first["config"]) == (str(tmp_path), "allow", {"a": 1})
    elsewhere = LogConfig(
        wandb_project="test", wandb_entity="team", wandb_save_dir=str(tmp_path / "files")
    )
    WandbRun(elsewhere, folder=tmp_path, settings={})
    assert fake.given["id"] != first["id"]
    assert fake.given["name"] == tmp_path.name
    assert (tmp_path / "files").is_dir()
    WandbRun(LOG, folder=tmp_path, settings={})
    assert fake.given["id"] == first["id"]
    assert capsys.readouterr().err == ""


def test_a_torn_id_file_is_a_warning_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Fake())
    (tmp_path / ID_FILE).write_text("{")
    WandbRun(LOG, folder=tmp_path, settings={}).write(ROW)
    assert "did not start" in capsys.readouterr().err
