"""Disk and memory are checked before a run, which is described or refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.errors import ConfigError
from cp_megatron.memory import capacity
from cp_megatron.memory.predict import predict
from cp_megatron.preflight.check import check
from cp_megatron.preflight.run_plan import RunPlan

GIB = capacity.GIB
KINDS = ("parameters", "optimizer", "gradients", "gathered weights", "activations")
ONE = Launch(rank=0, local_rank=0, world_size=1, local_world_size=1, under_torchrun=True)
TWO = Launch(rank=0, local_rank=0, world_size=2, local_world_size=2, under_torchrun=True)
PLAIN = Launch()
FLAGS = ["--preset", "toy-gpt", "--device", "cpu"]


def _least_bytes(plan: RunPlan) -> int:
    return capacity._least_of_several(plan, 1)


def planned(*argv: str, launch: Launch = ONE, dry_run: bool = False) -> RunPlan:
    found = parse_arguments([*FLAGS, *argv])
    return check(found.config, launch, given=found.given, dry_run=dry_run)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free bytes of every disk, as a list of one number."""
    left = [GIB]

    def usage(folder: Path) -> shutil._ntuple_diskusage:
        assert folder.exists()
        return shutil._ntuple_diskusage(10 * GIB, 9 * GIB, left[0])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return left


def test_a_disk_without_space_for_one_checkpoint(free: list[int], tmp_path: Path) -> None:
    plan = planned("--save", str(tmp_path / "a" / "b"))
    free[0] = capacity.checkpoint_bytes(plan)
    assert "are free" in capacity.check_disk(plan)
    free[0] -= 1
    with pytest.raises(ConfigError, match=r"--save .*a checkpoint takes .* are free") as refused:
        capacity.check_capacity(plan, ONE, dry_run=False)
    assert "larger disk" in refused.value.works


@pytest.mark.parametrize(
    ("flags", "num_kept"),
    [
        ([], 1),
        (["--save-interval", "50"], 4),
        (["--save-interval", "51"], 4),
        (["--save-interval", "10", "--keep-latest-k", "2"], 3),
        (["--save-interval", "10", "--keep-latest-k", "2", "--save-retain-interval", "100"], 5),
    ],
)
def test_checkpoints_that_will_not_all_fit(
    flags: list[str], num_kept: int, free: list[int]
) -> None:
    plan = planned("--train-iters", "200", *flags)
    size = capacity.checkpoint_bytes(plan)
    free[0] = num_kept * size
    assert "will not fit" not in capacity.check_disk(plan)
    free[0] -= 1
    if num_kept > 1:
        assert f"{num_kept} of them will not fit" in capacity.check_disk(plan)
        assert any("will not fit" in note for note in _notes(plan, ONE))
    else:
        with pytest.raises(ConfigError):
            capacity.check_disk(plan)


def _notes(plan: RunPlan, launch: Launch, *, dry_run: bool = False) -> tuple[str, ...]:
    return capacity.check_capacity(plan, launch, dry_run=dry_run).notes


def test_ranks_that_share_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = planned(), planned(launch=TWO)
    needed = _least_bytes(two)
    monkeypatch.setattr(capacity, "machine_bytes", lambda: 2 * needed)
    assert not [note for note in _notes(two, TWO) if note.startswith("memory")]
    assert [note for note in _notes(two, TWO, dry_run=True) if note.startswith("memory: 2 ranks")]
    monkeypatch.setattr(capacity, "machine_bytes", lambda: 2 * needed - 1)
    with pytest.raises(ConfigError, match=r"2 ranks hold .* there are"):
        _notes(two, TWO)
    _notes(one, ONE)
    monkeypatch.setattr(capacity, "machine_bytes", lambda: None)
    _notes(two, TWO)


def test_copies_on_nodes_are_made_only_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Launch(rank=0, local_rank=0, world_size=4, local_world_size=2, under_torchrun=True)
    auto = planned("--global-batch-size", "4", launch=nodes)
    one = planned("--global-batch-size", "4", "--data-parallel-replicate-size", "1", launch=nodes)
    asked = planned("--global-batch-size", "4", "--data-parallel-replicate-size", "2", launch=nodes)
    assert (auto.grid, one.grid.replicas) == (asked.grid, 1)
    more, less = (capacity._least_of_several(plan, 2) for plan in (auto, one))
    assert less < more

    def found(plan: RunPlan, num_bytes: int) -> RunPlan:
        monkeypatch.setattr(capacity, "machine_bytes", lambda: num_bytes)
        return capacity.check_capacity(plan, nodes, dry_run=False)

    assert found(auto, more).grid == auto.grid
    fits = found(auto, more - 1)
    assert fits.grid == one.grid
    (note,) = [note for note in fits.notes if "--data-parallel-replicate-size auto" in note]
    assert note.startswith("weights are sharded over all nodes")
    with pytest.raises(ConfigError, match="works: --data-parallel-replicate-size 1"):
        found(asked, more - 1)
    for plan in (auto, one, asked):
        with pytest.raises(ConfigError, match="works: more ranks"):
            found(plan, less - 1)


def test_offloaded_memory_is_not_counted() -> None:
    """Compares with a sum over the rows of the prediction, which another test checks."""
    cuda = ["--device", "cuda", "--recompute-granularity", "full", "--global-batch-size", "1"]
    cuda += ["--micro-batch-size", "1"]
    lean = [*cuda, "--cpu-offloading", "--optimizer-cpu-offload"]
    found = {}
    for name, flags in {"all": cuda, "lean": lean}.items():
        plan = check(parse_arguments(["--preset", "toy-gpt", *flags]).config, PLAIN, dry_run=True)
        rows = predict(plan, 0)
        found[name] = _least_bytes(plan)
        here = [row for row in rows if "on the host" not in (row.kind, row.detail)]
        sums = {kind: sum(r.num_bytes for r in here if r.kind == kind) for kind in KINDS}
        most = max(sums["gradients"], sums["gathered weights"] + sums["activations"])
        assert found[name] == sums["parameters"] + sums["optimizer"] + most
    assert found["lean"] < found["all"] / 2


def test_accumulated_gradients_are_added_to_the_activations() -> None:
    one, two = (planned("--micro-batch-size", "1", "--global-batch-size", n) for n in "12")
    gradients = next(row.num_bytes for row in predict(one, 0) if row.kind == "gradients")
    forward = _least_bytes(two) - gradients
    assert 0 < _least_bytes(one) - forward <= gradients or _least_bytes(one) == forward


def test_a_plan_for_another_machine_is_not_refused_by_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capacity, "machine_bytes", lambda: 1)
    plan = planned("--context-parallel-size", "4", launch=PLAIN, dry_run=True)
    *_, memory, exchange = _notes(plan, PLAIN, dry_run=True)
    assert re.fullmatch(r"memory: a rank holds \d+\.\d\d GiB at least on cpu in a step", memory)
    assert exchange.startswith("exchange: checked 4 messages between 4 ranks;"), exchange


def test_a_disk_of_another_machine_may_be_larger(free: list[int]) -> None:
    free[0] = 1
    notes = _notes(planned(launch=PLAIN, dry_run=True), PLAIN, dry_run=True)
    assert any("free here" in note for note in notes)
    sixteen = [*FLAGS, "--save", "some-folder", "--global-batch-size", "16"]
    plan = check(parse_arguments(sixteen).config, PLAIN, dry_run=True, dry_run_world_size=16)
    (told,) = (note for note in _notes(plan, PLAIN, dry_run=True) if note.startswith("disk"))
    assert told.endswith("free here, which is too few if the run is on this machine")
    here = planned("--save", "some-folder", launch=PLAIN, dry_run=True)
    with pytest.raises(ConfigError, match="a checkpoint takes"):
        _notes(here, PLAIN, dry_run=True)


def test_a_machine_has_memory() -> None:
    found = capacity.machine_bytes()
    assert found is None or found > GIB / 8
