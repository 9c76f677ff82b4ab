"""Damaged Hugging Face folders are refused in one line, or read completely as the files say."""

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
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cp_megatron.checkpoint.hf_folder import INDEX_FILE
from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.families.family import HFTensor
from cp_megatron.families.registry import read_hf_config
from tests.fuzz.mutations import forged_header, harm_bytes, harm_json, header_of, with_header
from tests.fuzz.reading import REFUSED, Trap, outcome, same, spread

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    },
}


def tensors_of(folder: Path) -> list[HFTensor]:
    found = read_hf_config(folder)
    return found.family.tensors(found.model, vocab_size=300, seq_length=64)


class Stub(nn.Module):
    """Has the tensors of a model under their names, but computes nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.config = read_hf_config(folder).model
        self.tensors = {
            part.name: torch.full(part.shape, torch.nan)
            for tensor in tensors_of(folder)
            for part in tensor.parts
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return dict(self.tensors)


def hf_numbers(folder: Path) -> dict[str, Tensor]:
    stub = Stub(folder)
    load_hf(folder, model=stub)
    return stub.tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    torch.manual_seed(5)
    save_file(
        {tensor.key: torch.randn(tensor.shape) for tensor in tensors_of(folder)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "header", "index"])
def test_a_folder_of_hugging_face(file: str, folder: Path) -> None:
    """Without a checksum, what is read is exactly what the files say, and never more."""
    rng, found = Random(4), Counter[str]()
    whole = hf_numbers(folder)
    path = folder / {"header": "model.safetensors", "index": INDEX_FILE}.get(file, file)
    if file == "index":
        split_in_two(folder)
    before = path.read_bytes()
    for _ in range(75):
        path.write_bytes(harmed_hf(rng, file, before))
        numbers = outcome(lambda: hf_numbers(folder))
        found[REFUSED if numbers == REFUSED else "read"] += 1
        if numbers != REFUSED:
            assert numbers.keys() == whole.keys()
            assert not any(tensor.isnan().all() for tensor in numbers.values())
            if file in ("config.json", "index"):
                assert same(numbers, whole)
            if file == "model.safetensors":
                assert path.stat().st_size == len(before)
    spread(found)


def split_in_two(folder: Path) -> None:
    """Replaces the single file by two shards and an index."""
    header, rest = header_of((folder / "model.safetensors").read_bytes())
    keys = [key for key in header if key != "__metadata__"]
    place = {}
    for number, part in enumerate((keys[::2], keys[1::2])):
        new, data = {}, b""
        for key in part:
            start, stop = header[key]["data_offsets"]
            new[key] = {**header[key], "data_offsets": [len(data), len(data) + stop - start]}
            data += rest[start:stop]
        (folder / f"part-{number}.safetensors").write_bytes(with_header(new, data))
        place |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": place}))


def harmed_hf(rng: Random, file: str, before: bytes) -> bytes:
    if file == "model.safetensors":
        return harm_bytes(rng, before)
    if file == "header":
        header, rest = header_of(before)
        forged = forged_header(rng, header) if rng.random() < 0.5 else harm_json(rng, header)[0]
        return with_header(forged, rest)
    if rng.random() < 0.3:
        return harm_bytes(rng, before)
    return json.dumps(harm_json(rng, json.loads(before))[0]).encode()


def test_what_are_no_weights(folder: Path, tmp_path: Path) -> None:
    """Pickles, a header of a terabyte, pipes, devices, names outside the folder are refused."""
    path, sprung = folder / "model.safetensors", tmp_path / "sprung"
    before, terabyte = path.read_bytes(), struct.pack("<Q", 1 << 40)
    for data in (pickle.dumps(Trap(sprung)), terabyte, terabyte + before[8:], b"", b"\xff" * 8):
        path.write_bytes(data)
        assert outcome(lambda: hf_numbers(folder)) == REFUSED
    for name in ("model.safetensors", "config.json"):
        kept = (folder / name).read_bytes()
        for target in (Path("/dev/zero"), tmp_path / "nowhere", folder / name, folder):
            (folder / name).unlink()
            (folder / name).symlink_to(target)
            assert outcome(lambda: hf_numbers(folder)) == REFUSED
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert outcome(lambda: hf_numbers(folder)) == REFUSED
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    path.write_bytes(before)
    whole = hf_numbers(folder)
    split_in_two(folder)
    assert same(hf_numbers(folder), whole)
    (folder / "part-0.safetensors").rename(tmp_path / "part-0.safetensors")
    text = (folder / INDEX_FILE).read_text()
    for name in ("../part-0.safetensors", str(tmp_path / "part-0.safetensors")):
        (folder / INDEX_FILE).write_text(text.replace("part-0.safetensors", name))
        assert outcome(lambda: hf_numbers(folder)) == REFUSED
    assert not sprung.exists()
