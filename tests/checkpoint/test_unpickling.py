"""A pickle that would execute code is refused wherever one is read, and executes nothing."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cp_megatron.checkpoint.torch_import import import_torch
from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.check import check
from tests.checkpoint import meta_llama
from tests.checkpoint.test_torch_import import config_folder, in_hf_names, save_dcp


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path, by: Callable[[str], Any] = os.mkdir) -> None:
        self.canary, self.by = canary, by

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return self.by, (str(self.canary),)


class TorchBomb(Bomb):
    """Goes through a function of torch itself, which the lists of torch might admit."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return torch.load, (str(self.canary),)


def in_metadata(folder: Path, bomb: Bomb) -> Path:
    save_dcp(meta_llama.weights(), folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"a": bomb}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def in_values(folder: Path, bomb: Bomb) -> Path:
    """In what torch.save wrote for one tensor; .metadata points to it."""
    save_dcp(meta_llama.weights(), folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    data = io.BytesIO()
    torch.save(bomb, data)
    for index, info in metadata.storage_data.items():
        if index.fqn == "norm.weight":
            info.offset, info.length = os.path.getsize(folder / "__0_0.distcp"), data.tell()
    with (folder / "__0_0.distcp").open("ab") as stream:
        stream.write(data.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def in_file(folder: Path, bomb: Bomb) -> Path:
    torch.save({**meta_llama.weights(), "extra": bomb}, folder / "model.pt")
    return folder / "model.pt"


def in_old_file(folder: Path, bomb: Bomb) -> Path:
    content = {**meta_llama.weights(), "extra": bomb}
    torch.save(content, folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder / "model.pt"


def in_bare_pickle(folder: Path, bomb: Bomb) -> Path:
    """Where the format before torch 1.6 has its magic number."""
    head = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    (folder / "model.pt").write_bytes(head + pickle.dumps(bomb))
    return folder / "model.pt"


PLACES = (in_metadata, in_values, in_file, in_old_file, in_bare_pickle)


@pytest.mark.parametrize("kind", [Bomb, TorchBomb])
@pytest.mark.parametrize("place", PLACES)
def test_a_bomb_in_a_conversion(
    tmp_path: Path, place: Callable[[Path, Bomb], Path], kind: type[Bomb]
) -> None:
    (tmp_path / "in").mkdir()
    source = place(tmp_path / "in", kind(tmp_path / "canary"))
    config = config_folder(tmp_path / "config")
    with pytest.raises(ConfigError, match=r"posix.mkdir|torch.serialization.load|is damaged"):
        import_torch(source, config, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config", "in"]


@pytest.mark.parametrize("new", [True, False])
def test_a_bomb_in_pytorch_model(tmp_path: Path, new: bool) -> None:
    folder = config_folder(tmp_path / "model")
    content = {**in_hf_names(meta_llama.weights()), "extra": Bomb(tmp_path / "canary")}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    arguments = parse_arguments(["--load-hf", str(folder), "--tokenizer-type", "byte"])
    with pytest.raises(ConfigError, match=r"pytorch_model.bin holds 'posix.mkdir', .*not"):
        check(arguments.config, Launch())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_class_cannot_be_changed_by_a_pickle(tmp_path: Path) -> None:
    """A pickle may set attributes of the classes that it names; they live as long as it."""
    from cp_megatron.checkpoint.inert_pickle import Record, read_pickle

    # GLOBAL torch.device, then BUILD with attributes for the class itself.
    program = b"\x80\x02ctorch\ndevice\nN}X\x04\x00\x00\x00nameX\x04\x00\x00\x00evils\x86b."
    with pytest.raises(Exception, match="damaged"):
        read_pickle(io.BytesIO(program))
    assert Record.name == ""


def lists_that_hold_each_other() -> Iterator[object]:
    """Walking through them would take forever, or more memory than there is."""
    itself: list[object] = []
    itself.append(itself)
    yield itself
    doubled: list[object] = []
    for _ in range(40):
        doubled = [doubled, doubled]
    yield doubled


@pytest.mark.parametrize("extra", [*lists_that_hold_each_other()], ids=["itself", "doubled"])
def test_lists_without_an_end(
    tmp_path: Path, extra: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cp_megatron.checkpoint.torch_file._MAX_CONTAINERS", 10_000)
    torch.save({**meta_llama.weights(), "extra": extra}, tmp_path / "model.pt")
    config = config_folder(tmp_path / "config")
    with pytest.raises(ConfigError, match="more than 100 deep, or more than 10,000"):
        import_torch(tmp_path / "model.pt", config, tmp_path / "out")


def test_the_answer_to_an_object_of_another_program(tmp_path: Path) -> None:
    torch.save({**meta_llama.weights(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "model.pt")
    config = config_folder(tmp_path / "config")
    works = re.escape(
        "a file of the weights alone, as torch.save(model.state_dict(), FILE) writes them"
    )
    with pytest.raises(ConfigError, match=f"holds 'argparse.Namespace', .*works: {works}"):
        import_torch(tmp_path / "model.pt", config, tmp_path / "out")


def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    save_dcp(meta_llama.weights(), tmp_path / "dcp")
    metadata = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../dcp/__0_0.distcp"
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    config = config_folder(tmp_path / "config")
    with pytest.raises(ConfigError, match=r"'../dcp/__0_0.distcp', which is no file beside it"):
        import_torch(tmp_path / "dcp", config, tmp_path / "out")


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    save_dcp(meta_llama.weights(), tmp_path / "dcp")
    metadata = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())
    metadata.state_dict_metadata["norm.weight"].properties.dtype = "float99"
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    config = config_folder(tmp_path / "config")
    with pytest.raises(ConfigError, match="does not describe a checkpoint"):
        import_torch(tmp_path / "dcp", config, tmp_path / "out")


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    config = config_folder(tmp_path / "config")
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(ConfigError, match="is compressed"):
        import_torch(tmp_path / "m.pt", config, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("notes.txt", json.dumps({}))
    with pytest.raises(ConfigError, match="is a zip archive, but not one"):
        import_torch(tmp_path / "m.pt", config, tmp_path / "out")
