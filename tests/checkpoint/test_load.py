"""Saving and loading in one process is exact; other models, damage and pickles are refused."""

from __future__ import annotations

import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.manifest import read_manifest
from cp_megatron.checkpoint.save_planner import storable
from cp_megatron.checkpoint.shard_reader import ShardReader
from cp_megatron.checkpoint.step_folders import newest_step
from cp_megatron.errors import ConfigError
from tests.checkpoint import toy


def refuse(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(folder, model=model, optimizer=optimizer)
    assert caught.value.flag == "--load"
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer = toy.make(None, dtype=dtype, updates=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = toy.save(tmp_path / "new" / "run", model, optimizer)
        other, its_optimizer = toy.make(None, dtype=dtype, updates=1)
        toy.scramble(other, its_optimizer)
        load_checkpoint(folder, model=other, optimizer=its_optimizer)
    expected, found = toy.snapshot(model, optimizer), toy.snapshot(other, its_optimizer)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
        assert found[name].dtype == expected[name].dtype
    assert other.tied is other.column
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_learning_rates_are_not_stored(tmp_path: Path) -> None:
    folder = toy.save(tmp_path, *toy.make(None, updates=1))
    model, optimizer = toy.make(None)
    optimizer.param_groups[0]["lr"] = 0.7
    load_checkpoint(folder, model=model, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_before_the_first_update_no_state_is_stored(tmp_path: Path) -> None:
    folder = toy.save(tmp_path, *toy.make(None), step=0)
    model, optimizer = toy.make(None, updates=2)
    load_checkpoint(folder, model=model, optimizer=optimizer)
    assert not optimizer.state


def test_a_parameter_without_an_update_keeps_none(tmp_path: Path) -> None:
    model, optimizer = toy.make(None)
    model.norm.grad = torch.ones_like(model.norm)
    optimizer.step()
    folder = toy.save(tmp_path, model, optimizer)
    other, its_optimizer = toy.make(None, updates=2)
    load_checkpoint(folder, model=other, optimizer=its_optimizer)
    assert list(its_optimizer.state) == [other.norm]
    assert its_optimizer.state[other.norm]["step"] == 1


def test_the_model_alone(tmp_path: Path) -> None:
    model, optimizer = toy.make(None, updates=2)
    folder = toy.save(tmp_path, model, optimizer)
    other, its_optimizer = toy.make(None)
    load_checkpoint(folder, model=other, optimizer=None)
    assert torch.equal(other.row, model.row)
    alone = toy.save(tmp_path, model, None, step=5)
    load_checkpoint(alone, model=other, optimizer=None)
    assert "holds no optimizer state" in refuse(alone, other, its_optimizer)


def test_a_whole_tensor_has_its_own_name_for_other_programs(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, optimizer = toy.make(None, updates=1)
    folder = toy.save(tmp_path, model, optimizer)
    assert torch.equal(load_file(folder / "rank-00000.safetensors")["model.row"], model.row)


class Other(toy.Toy):
    """The toy model with one change."""

    def __init__(self, change: str) -> None:
        super().__init__(None, torch.float64 if change == "dtype" else torch.float32)
        if change == "shape":
            self.norm = nn.Parameter(torch.ones(6))
        if change == "more":
            self.extra = nn.Parameter(torch.ones(2))
        if change == "less":
            del self.norm
        if change == "untied":
            self.tied = nn.Parameter(torch.ones(12, 6))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("shape", "model.norm is [5], but [6] in this model"),
        ("more", "model.extra is not in the checkpoint"),
        ("less", "model.norm is not in this model"),
        ("untied", "model.tied is not in the checkpoint"),
        ("dtype", "model.bias is float32, but float64 in this model"),
    ],
)
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_another_model_is_refused(
    change: str, names: str, with_optimizer: bool, tmp_path: Path
) -> None:
    folder = toy.save(tmp_path, *toy.make(None, updates=1))
    other = Other(change)
    optimizer = torch.optim.AdamW(other.parameters()) if with_optimizer else None
    message = refuse(folder, other, optimizer)
    assert "is of another model: " in message
    assert names in message


def test_only_the_first_few_differences_are_named(tmp_path: Path) -> None:
    folder = toy.save(tmp_path, *toy.make(None, updates=1))
    message = refuse(folder, nn.Linear(2, 2), None)
    assert message.count(";") == 2
    assert "and 5 more" in message


def test_an_unfinished_save_is_passed_over_and_replaced(tmp_path: Path) -> None:
    model, optimizer = toy.make(None, updates=1)
    toy.save(tmp_path, model, optimizer, step=3)
    torn = tmp_path / "step-4.tmp"
    torn.mkdir()
    (torn / "rank-00007.safetensors").write_bytes(b"torn")
    assert newest_step(tmp_path) == tmp_path / "step-3"
    toy.save(tmp_path, model, optimizer, step=4)
    assert newest_step(tmp_path) == tmp_path / "step-4"
    assert not torn.exists()
    names = sorted(path.name for path in (tmp_path / "step-4").iterdir())
    assert names == ["manifest.json", "rank-00000.safetensors"]


@pytest.mark.parametrize("existing", ["folder", "file", "dangling link"])
def test_an_existing_step_is_never_touched(existing: str, tmp_path: Path) -> None:
    target = tmp_path / "step-3"
    if existing == "folder":
        target.mkdir()
    elif existing == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="step-3 exists already"):
        toy.save(tmp_path, *toy.make(None, updates=1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_run_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--save .*rank 0: Not a directory"):
        toy.save(tmp_path / "file" / "run", *toy.make(None, updates=1))


def test_damage_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = toy.save(tmp_path, *toy.make(None, updates=1))
    shard = folder / "rank-00000.safetensors"
    good = shard.read_bytes()
    model, optimizer = toy.make(None)
    before = model.row.clone()
    for place in range(0, len(good), 97):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        shard.write_bytes(data)
        assert "rank-00000.safetensors is damaged" in refuse(folder, model, optimizer)
    shard.write_bytes(good[:-1])
    assert "rank-00000.safetensors has" in refuse(folder, model, optimizer)
    shard.unlink()
    assert "rank-00000.safetensors cannot be read" in refuse(folder, model, optimizer)
    assert torch.equal(model.row, before)
    assert not optimizer.state


class Trap:
    """Unpickling it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    model, optimizer = toy.make(None, updates=1)
    folder = toy.save(tmp_path / "run", model, optimizer)
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in (".metadata", "__0_0.distcp", "rank-00001.safetensors", "optimizer.pt"):
        (folder / name).write_bytes(trap)
    load_checkpoint(folder, model=model, optimizer=optimizer)
    (folder / "rank-00000.safetensors").write_bytes(trap)
    refuse(folder, model, optimizer)
    (folder / "manifest.json").write_bytes(trap)
    refuse(folder, model, optimizer)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists(), "the trap itself works"


def test_byte_items_are_refused_on_save() -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({"epoch": 3})
    with pytest.raises(TypeError, match="epoch is not a tensor"):
        storable(planner.create_local_plan().items)


def test_byte_items_are_refused_on_load(tmp_path: Path) -> None:
    folder = toy.save(tmp_path, *toy.make(None, updates=1))
    reader = ShardReader(folder, read_manifest(folder).tensors)
    index, none = MetadataIndex("epoch"), torch.Size([0])
    item = ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none)
    with pytest.raises(TypeError, match="epoch is not a tensor"):
        reader.prepare_local_plan(LoadPlan([item]))


def test_extra_state_of_a_module_is_refused(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> object:
            return {"epoch": 3}

    with pytest.raises(TypeError, match="_extra_state is not a tensor"):
        toy.save(tmp_path, Stateful(2, 2), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"key": "model.column"}, "holds model.row in another shape"),
        ({"key": "model.gone"}, "cannot be read"),
        ({"dtype": "int32"}, "holds model.row in another dtype"),
    ],
)
def test_a_shard_that_is_not_what_the_manifest_says(
    values: dict[str, str], rule: str, tmp_path: Path
) -> None:
    # The hashes match the contents, but the contents do not match the manifest.
    folder = toy.save(tmp_path, *toy.make(None, updates=1))
    manifest = read_manifest(folder)
    entry = manifest.tensors["model.row"]
    chunks = tuple(replace(chunk, key=values.get("key", chunk.key)) for chunk in entry.chunks)
    entry = replace(entry, dtype=values.get("dtype", entry.dtype), chunks=chunks)
    tensors = {**manifest.tensors, "model.row": entry}
    reader = ShardReader(folder, tensors)
    model, _ = toy.make(None)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner({"model.row": model.row.detach()}, reader.read_metadata())
    with pytest.raises(ConfigError, match=f"rank-00000.safetensors {rule}"):
        reader.read_data(planner.create_local_plan(), planner)
