"""A manifest is read back as it was written; one that cannot be trusted is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.checkpoint.manifest import (
    ChunkEntry,
    FileEntry,
    Manifest,
    TensorEntry,
    file_sha256,
    read_manifest,
    verify_files,
)
from cp_megatron.checkpoint.step_folders import newest_step
from cp_megatron.errors import ConfigError

SHARD = "rank-00000.safetensors"


def chunk(offset: int, size: int) -> ChunkEntry:
    return ChunkEntry(offsets=(offset, 0), sizes=(size, 3), file=SHARD, key=f"w@{offset},0")


MANIFEST = Manifest(
    version=1,
    step=7,
    consumed=56,
    config={"preset": "toy", "train": {"lr": 0.1}},
    data_fingerprint="ab",
    vocab_size=257,
    torch_version="2",
    package_version="0",
    grid={"dp": 1, "cp": 2, "tp": 2},
    optimizer_steps={"w": 7},
    extra={"losses": [0.1, 2.5]},
    files={SHARD: FileEntry(size=64, sha256="")},
    tensors={
        "model.w": TensorEntry(dtype="float32", shape=(4, 3), chunks=(chunk(0, 1), chunk(1, 3)))
    },
)


def write(folder: Path, manifest: Manifest = MANIFEST) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SHARD).write_bytes(bytes(64))
    files = {
        name: replace(entry, sha256=file_sha256(folder / name)) if name == SHARD else entry
        for name, entry in manifest.files.items()
    }
    (folder / "manifest.json").write_text(replace(manifest, files=files).to_json())
    return folder


def refuse(folder: Path, rule: str) -> ConfigError:
    with pytest.raises(ConfigError, match=rule) as caught:
        verify_files(folder, read_manifest(folder))
    assert caught.value.flag == "--load"
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_manifest_is_read_back(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path / "step-7"))
    verify_files(tmp_path / "step-7", manifest)
    assert replace(manifest, files=MANIFEST.files) == MANIFEST


def test_the_newest_step_is_the_largest_number_that_is_finished(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "none") is None
    assert newest_step(tmp_path) is None
    write(tmp_path / "step-9")
    write(tmp_path / "step-10")
    write(tmp_path / "step-11.tmp")
    write(tmp_path / "step-012")
    write(tmp_path / "other-13")
    (tmp_path / "step-14").mkdir()
    (tmp_path / "step-15").write_text("a file")
    assert newest_step(str(tmp_path)) == tmp_path / "step-10"


def test_missing(tmp_path: Path) -> None:
    write(tmp_path / "step-5")
    (tmp_path / "step-7").mkdir()
    assert refuse(tmp_path / "step-7", "not a finished checkpoint").works == str(
        tmp_path / "step-5"
    )
    refuse(tmp_path / "none", "not a finished checkpoint")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '"a"', "{}", "\0", "[" * 100_000])
def test_not_a_manifest(text: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    refuse(tmp_path, "malformed")


def test_not_utf8(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b'{"a": "\xff"}')
    refuse(tmp_path, "malformed")


def test_a_pipe_is_not_a_manifest(tmp_path: Path) -> None:
    path = write(tmp_path) / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    refuse(tmp_path, "malformed: it is not a regular file")


def test_a_manifest_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (write(tmp_path) / "manifest.json").open("r+b") as file:
        file.truncate(2**31)  # a hole, which takes no space on the disk
    refuse(tmp_path, "at most 1073741824 bytes")


def test_nesting_too_deep_to_check(tmp_path: Path) -> None:
    # Around the depth at which the parser succeeds, but later code may not.
    write(tmp_path)
    for depth in range(sys.getrecursionlimit() - 100, sys.getrecursionlimit()):
        nested = "[" * depth + "]" * depth
        text = f'{{"manifest": {{"config": {nested}}}, "sha256": ""}}'
        (tmp_path / "manifest.json").write_text(text)
        refuse(tmp_path, "malformed|damaged")


@pytest.mark.parametrize("columns", [1, 3])
def test_boxes_side_by_side_do_not_overlap(columns: int, tmp_path: Path) -> None:
    """A tensor that is split along both dims, as over tp and dp x cp."""
    chunks = tuple(
        ChunkEntry(offsets=(row, column), sizes=(2, columns), file=SHARD, key=f"{row} {column}")
        for row in (0, 2)
        for column in range(0, 3, columns)
    )
    tensors = {"model.w": TensorEntry(dtype="float32", shape=(4, 3), chunks=chunks)}
    manifest = read_manifest(write(tmp_path, replace(MANIFEST, tensors=tensors)))
    assert manifest.tensors == tensors


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = write(tmp_path) / "manifest.json"
    good = path.read_bytes()
    for place in range(len(good) - 1):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        refuse(tmp_path, "malformed|damaged")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the fields and writes the checksum of the new fields."""
    path = write(folder) / "manifest.json"
    fields = json.loads(path.read_text())["manifest"]
    change(fields)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps({"manifest": fields, "sha256": digest}))


def boxes(*rows: tuple[int, int]) -> list[dict[str, Any]]:
    return [asdict(chunk(offset, size)) for offset, size in rows]


def set_chunk(fields: dict[str, Any], **values: object) -> None:
    fields["tensors"]["model.w"]["chunks"][1].update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("step"),
        lambda m: m.update(step="7"),
        lambda m: m.update(step=-1),
        lambda m: m.update(step=True),
        lambda m: m.update(step=7.5),
        lambda m: m.update(step=2**63),
        lambda m: m.update(config=[]),
        lambda m: m.update(grid={"dp": "1"}),
        lambda m: m.update(files=[]),
        lambda m: m.update(files={SHARD: 3}),
        lambda m: m["tensors"]["model.w"].update(dtype="object"),
        lambda m: m["tensors"]["model.w"].update(chunks={}),
        lambda m: m["tensors"]["model.w"].update(shape=[4]),
        lambda m: m["tensors"]["model.w"].update(shape=[5, 3]),
        lambda m: m["tensors"]["model.w"].update(chunks=[3]),
        lambda m: m["tensors"]["model.w"]["chunks"].pop(),
        lambda m: set_chunk(m, offsets=[2, 0]),
        lambda m: set_chunk(m, offsets=[0, 0]),
        # The number of elements is right, but row 1 is stored twice and row 3 is missing.
        lambda m: m["tensors"]["model.w"].update(chunks=boxes((0, 2), (1, 2))),
        lambda m: set_chunk(m, offsets=[1, "0"]),
        lambda m: set_chunk(m, sizes=[3, -3]),
        lambda m: set_chunk(m, file="rank-00001.safetensors"),
        lambda m: m.update(
            tensors={
                "a": {
                    "dtype": "float64",
                    "shape": [2**40],
                    "chunks": [{"offsets": [0], "sizes": [2**40], "file": SHARD, "key": "a"}],
                }
            }
        ),
    ],
)
def test_fields_that_are_wrong(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    rewrite(tmp_path, change)
    refuse(tmp_path, "malformed")


def test_another_version(tmp_path: Path) -> None:
    write(tmp_path, replace(MANIFEST, version=2))
    refuse(tmp_path, "has checkpoint format 2, but this program reads 1")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "rank-00000.safetensors/../../outside",
        "sub/rank-00000.safetensors",
        "rank-00000.pt",
        ".rank-00000.safetensors",
        "rank-00000.safetensors\n",
        "",
    ],
)
def test_a_file_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes(bytes(64))
    entry = FileEntry(size=64, sha256=file_sha256(tmp_path / "outside.safetensors"))
    files = {**MANIFEST.files, name: entry}
    refuse(write(tmp_path / "step-7", replace(MANIFEST, files=files)), "not the name of a shard")


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "step-7")
    (folder / SHARD).rename(tmp_path / "outside")
    (folder / SHARD).symlink_to(tmp_path / "outside")
    refuse(folder, f"{SHARD} is not a regular file")


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "step-7")
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    refuse(folder, f"{SHARD} is not a regular file")


def test_shards_are_compared(tmp_path: Path) -> None:
    write(tmp_path / "step-3")
    shard = write(tmp_path / "step-7") / SHARD
    data = bytearray(64)
    for place in range(64):
        data[place] ^= 1 << place % 8
        shard.write_bytes(data)
        error = refuse(tmp_path / "step-7", f"{SHARD} is damaged")
        data[place] = 0
    assert error.works == str(tmp_path / "step-3")
    shard.write_bytes(bytes(63))
    refuse(tmp_path / "step-7", f"{SHARD} has 63 bytes, but the manifest says 64")
    shard.unlink()
    refuse(tmp_path / "step-7", f"{SHARD} cannot be read")


def test_an_older_checkpoint_without_extra_is_read(tmp_path: Path) -> None:
    fields = asdict(replace(MANIFEST, files={}, tensors={}))
    del fields["extra"]
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7" / "manifest.json").write_text(
        json.dumps({"manifest": fields, "sha256": digest})
    )
    assert read_manifest(tmp_path / "step-7").extra == {}


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    key = replace(MANIFEST.tensors["model.w"].chunks[0], key="\udcff")
    entry = replace(MANIFEST.tensors["model.w"], chunks=(key, chunk(1, 3)))
    folder = write(tmp_path / "step-7", replace(MANIFEST, tensors={"model.w": entry}))
    refuse(folder, "key is missing or not valid")
