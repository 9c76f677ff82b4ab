"""Damaged files are refused in one line, or read with the numbers that they had.

Together with ``test_hf_files`` there are a thousand of them. Reading any of them takes little time
and memory, opens no other file and runs no code. In a format without a checksum a changed number
cannot be detected; the test then says what can.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import Tensor

from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.manifest import FileEntry, file_sha256, read_manifest
from cp_megatron.cli.parse import parse_arguments
from cp_megatron.config import Config
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.config.files.run_folders import CONFIG_FILE
from cp_megatron.config.files.yaml_io import to_yaml
from cp_megatron.data.read.indexed import HEADER, IndexedDataset
from cp_megatron.preflight.save_and_load import check_resume, data_changes, find_load
from tests.checkpoint import toy
from tests.data.ranges import write_pair
from tests.fuzz.mutations import (
    forged_header,
    harm_bytes,
    harm_json,
    header_of,
    sealed,
    with_header,
)
from tests.fuzz.reading import REFUSED, Trap, outcome, same, spread

# --- PREFIX.bin and PREFIX.idx


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_pairs(vocab_size: int, tmp_path: Path) -> None:
    """Without a checksum a changed id cannot be detected, but the fingerprint changes."""
    prefix, rng = str(tmp_path / "pair"), Random(vocab_size)
    documents = ([rng.randrange(300) for _ in range(length)] for length in (3, 0, 40, 1, 17))
    write_pair(prefix, documents, vocab_size)
    files = [Path(prefix + suffix) for suffix in (".idx", ".bin")]
    before = [file.read_bytes() for file in files]
    whole = IndexedDataset.open(prefix)
    found: Counter[str] = Counter()
    for number in range(150):
        place = 0 if number % 3 else 1
        damaged = moved(rng, before[0]) if number % 3 == 2 else harm_bytes(rng, before[place])
        files[place].write_bytes(damaged)
        data = outcome(lambda: opened(prefix, vocab_size))
        found[str(data)[:7]] += 1
        if data != REFUSED:
            assert data.fingerprint != whole.fingerprint
            assert data.lengths.tolist() == whole.lengths.tolist()
            assert data.starts.tolist() == whole.starts.tolist()
            ends = data.document_index.tolist()
            assert ends == sorted(ends)
            assert (ends[0], ends[-1]) == (0, len(data.lengths))
            assert data.tokens.tobytes() == files[1].read_bytes()
            if place == 0:
                assert data.tokens.tolist() == whole.tokens.tolist()
        files[place].write_bytes(before[place])
    spread(found)


def moved(rng: Random, index: bytes) -> bytes:
    """An .idx in whose tables one number is slightly larger or smaller."""
    place = HEADER.size + 4 * rng.randrange((len(index) - HEADER.size) // 4)
    (value,) = struct.unpack_from("<i", index, place)
    value += rng.choice([-2, -1, 1, 2])
    return index[:place] + struct.pack("<i", value) + index[place + 4 :]


def opened(prefix: str, vocab_size: int) -> IndexedDataset:
    data = IndexedDataset.open(prefix)
    data.check_vocabulary(vocab_size)
    return data


# --- step-N: manifest.json and shards


class Saved:
    """A checkpoint of the toy model, and the content of its files."""

    def __init__(self, folder: Path) -> None:
        made = toy.make(None, updates=2)
        self.step = toy.save(folder, *made)
        self.numbers = toy.snapshot(*made)
        self.manifest = (self.step / "manifest.json").read_bytes()
        self.shard_path = self.step / "rank-00000.safetensors"
        self.shard = self.shard_path.read_bytes()
        self.fields: dict[str, Any] = json.loads(self.manifest)["manifest"]

    def restore(self) -> None:
        (self.step / "manifest.json").write_bytes(self.manifest)
        self.shard_path.unlink(missing_ok=True)
        self.shard_path.write_bytes(self.shard)

    def load(self) -> dict[str, Tensor]:
        """The numbers that a run would load."""
        model, optimizer = toy.make(None)
        toy.scramble(model, optimizer)
        load_checkpoint(self.step, model=model, optimizer=optimizer)
        return toy.snapshot(model, optimizer)

    def seal(self) -> None:
        """Writes a manifest that matches the current shard, as a forger would."""
        entry = FileEntry(size=self.shard_path.stat().st_size, sha256=file_sha256(self.shard_path))
        files = {self.shard_path.name: vars(entry)}
        (self.step / "manifest.json").write_bytes(sealed({**self.fields, "files": files}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    saved = Saved(tmp_path_factory.mktemp("run"))
    assert same(saved.load(), saved.numbers)
    return saved


@pytest.mark.parametrize("file", ["manifest.json", "rank-00000.safetensors"])
def test_bytes_of_a_checkpoint(file: str, saved: Saved) -> None:
    """The SHA-256 of the manifest and of the shards cover every byte that has a meaning."""
    rng = Random(1)
    path, before = saved.step / file, (saved.step / file).read_bytes()
    for _ in range(75):
        path.write_bytes(harm_bytes(rng, before))
        numbers = outcome(saved.load)
        saved.restore()
        assert numbers == REFUSED or same(numbers, saved.numbers)


def test_manifests_with_a_right_sum(saved: Saved) -> None:
    """Only the manifest's entries of tensors can change the numbers; other changes cannot."""
    rng, found = Random(2), Counter[str]()
    config = parse_arguments(["--load", str(run_folder_of(saved))]).config
    for _ in range(250):
        fields, place = harm_json(rng, saved.fields)
        (saved.step / "manifest.json").write_bytes(sealed(fields))
        numbers = outcome(saved.load)
        outcome(lambda: looked_at(config))
        saved.restore()
        found[REFUSED if numbers == REFUSED else place[0]] += 1
        if numbers != REFUSED and place[0] not in ("tensors", "optimizer_steps"):
            assert same(numbers, saved.numbers), place
    spread(found)


def run_folder_of(saved: Saved) -> Path:
    (saved.step.parent / CONFIG_FILE).write_text(to_yaml(Config()))
    return saved.step.parent


def looked_at(config: Config) -> None:
    """Checks a manifest as it is checked before torch is imported."""
    found = find_load(config)
    assert found is not None
    check_resume(config, found.manifest, 257)
    data_changes(config, found.manifest)


def test_shards_with_a_right_sum(saved: Saved) -> None:
    """A forged shard is refused, or read as it claims; it contains only numbers."""
    rng, found = Random(3), Counter[str]()
    header, rest = header_of(saved.shard)
    for number in range(150):
        if number % 3 == 0:
            data = harm_bytes(rng, saved.shard[:208]) + saved.shard[208:]
        elif number % 3 == 1:
            data = with_header(harm_json(rng, header)[0], rest)
        else:
            data = with_header(forged_header(rng, header), rest)
        saved.shard_path.write_bytes(data)
        saved.seal()
        numbers = outcome(saved.load)
        saved.restore()
        found[REFUSED if numbers == REFUSED else "read"] += 1
        if numbers != REFUSED:
            assert numbers.keys() == saved.numbers.keys()
            stored = [numbers[name] for name in numbers if not name.endswith(".step")]
            # Exactly as stored: nothing is converted.
            assert all(tensor.numpy().tobytes() in data for tensor in stored)
    spread(found)


def test_what_is_no_shard(saved: Saved, tmp_path: Path) -> None:
    """Pickles, links, pipes, devices and a header of a terabyte, all with a matching checksum."""
    sprung = tmp_path / "sprung"
    outside = tmp_path / "outside"
    outside.write_bytes(saved.shard)
    terabyte = struct.pack("<Q", 1 << 40)
    for data in (
        pickle.dumps(Trap(sprung)),
        terabyte,
        terabyte + saved.shard[8:],
        b"",
        b"\xff" * 8,
    ):
        saved.shard_path.write_bytes(data)
        saved.seal()
        assert outcome(saved.load) == REFUSED
    for target in (outside, Path("/dev/zero"), tmp_path / "nowhere", saved.shard_path):
        saved.restore()
        saved.shard_path.unlink()
        saved.shard_path.symlink_to(target)
        assert outcome(saved.load) == REFUSED
    saved.shard_path.unlink()
    os.mkfifo(saved.shard_path)
    assert outcome(saved.load) == REFUSED
    saved.restore()
    for name in ("../outside", str(outside), "rank-00000.safetensors/../../outside"):
        text = json.dumps(saved.fields).replace(saved.shard_path.name, name)
        (saved.step / "manifest.json").write_bytes(sealed(json.loads(text)))
        assert outcome(lambda: read_manifest(saved.step)) == REFUSED
    saved.restore()
    assert not sprung.exists()
    assert same(saved.load(), saved.numbers)


# --- config.yaml

EVIL = (
    "!!python/object/apply:os.mkdir [sprung]",
    "!!python/name:os.system",
    "!!python/object/new:os.mkdir [sprung]",
    *("!!int x", "!!bool x", "!!float x", "!!timestamp x", "!!binary x", "!!set {a}", "!!null x"),
    *(
        "&a [*a]",
        "*nothing",
        "<<: 3",
        "[" * 3000,
        "{" * 3000,
        "0x" + "f" * 5000,
        "9" * 5000,
        "1:30",
    ),
    *("|", ">", "? [1]", "2020-99-99", ".nan", ".inf", "-.inf", "1e999", "~", "---", "%YAML 9.9"),
)


def test_configurations_as_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that is read can be written and read again; a YAML tag never runs code."""
    monkeypatch.chdir(tmp_path)
    rng, found = Random(5), Counter[str]()
    texts = [to_yaml(config) for config in PRESETS.values()]
    for _ in range(125):
        text = rng.choice(texts)
        if rng.random() < 0.3:
            data = harm_bytes(rng, text.encode())
        elif rng.random() < 0.4:
            number = rng.randrange(len(text))
            data = (text[:number] + rng.choice("0123456789.-e _:\n#") + text[number + 1 :]).encode()
        else:
            lines = text.splitlines()
            number = rng.randrange(len(lines))
            key = lines[number].partition(":")[0]
            lines[number] = rng.choice([f"{key}: ", ""]) + rng.choice(EVIL)
            data = "\n".join(lines).encode()
        Path("some.yaml").write_bytes(data)
        config = outcome(lambda: parse_arguments(["--config", "some.yaml"]).config)
        found[REFUSED if config == REFUSED else "read"] += 1
        if config != REFUSED:
            Path("some.yaml").write_text(to_yaml(config))
            assert parse_arguments(["--config", "some.yaml"]).config == config
    spread(found)
    assert not Path("sprung").exists()
