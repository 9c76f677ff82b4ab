"""``pytorch_model.bin``, whole or in shards, is read as the safetensors of the same model are."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cp_megatron.checkpoint.hf_folder import find_weights
from cp_megatron.checkpoint.torch_file_reader import TorchFileReader
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import read_hf_config
from cp_megatron.plan import Grid
from tests.checkpoint.test_huggingface import VOCAB, load_on, make_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)


def write(folder: Path, state: dict[str, Tensor], *, shards: int, new: bool) -> Path:
    """Writes the weights as transformers did before safetensors."""
    keys, index = list(state), dict[str, str]()
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        name = "pytorch_model.bin" if shards == 1 else name
        part = {key: state[key] for key in keys[number::shards]}
        index |= dict.fromkeys(part, name)
        torch.save(part, folder / name, _use_new_zipfile_serialization=new)
    if shards > 1:
        body = {"metadata": {}, "weight_map": index}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(body))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model four times: safetensors, one file, three shards, and torch's old format."""
    root, model = tmp_path_factory.mktemp("bin"), make_model(attention_bias=True, mlp_bias=True)
    made = [root / str(number) for number in range(4)]
    for folder in made:
        model.config.save_pretrained(folder)
    model.save_pretrained(made[0])
    state = model.state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(made[1], state, shards=1, new=True)
    write(made[2], state, shards=3, new=True)
    write(made[3], state, shards=1, new=False)
    return made


def local_weights(rank: int, world_size: int, folders: list[Path], grid: Grid) -> list[bool]:
    """Whether this rank's part of each folder equals its part of the first."""
    states = [load_on(folder, grid)[0].state_dict() for folder in folders]
    return [
        all(torch.equal(value.to_local(), states[0][name].to_local()) for name, value in x.items())
        for x in states
    ]


@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2)])
def test_every_rank_loads_the_same(folders: list[Path], grid: Grid) -> None:
    for equal in run_ranks(local_weights, grid.world_size, folders, grid):
        assert equal == [True] * 4


def test_views_are_read_by_their_strides(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.bfloat16).view(5, 12)
    views = {"t": base.T, "part": base[1:4, 2:9:3], "none": base[:0], "one": base[2, 3]}
    for new in (True, False):
        torch.save(views, tmp_path / "v.pt", _use_new_zipfile_serialization=new)
        with TorchFileReader.open(tmp_path / "v.pt") as file:
            for name, expected in views.items():
                assert torch.equal(file.get_tensor(name), expected), (new, name)
            assert torch.equal(file.get_slice("t")[3:7, 1:2], base.T[3:7, 1:2])


def test_safetensors_come_first(folders: list[Path], tmp_path: Path) -> None:
    model = make_model(attention_bias=True, mlp_bias=True)
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    found = read_hf_config(tmp_path)
    sources = find_weights(found, found.model, padded_vocab_size=VOCAB)
    assert {chunk.file for x in sources.values() for chunk in x.entry.chunks} == {
        "model.safetensors"
    }


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"x": torch.ones(2)}, "pytorch_model.bin holds x, which config.json has no place for"),
        ({"model.norm.weight": torch.ones(3)}, "model.norm.weight has the shape"),
        ({"model.norm.weight": torch.ones(32).int()}, "model.norm.weight has the dtype int32"),
        (None, "pytorch_model.bin is truncated"),
    ],
)
def test_damage_is_told(tmp_path: Path, change: dict[str, Tensor] | None, rule: str) -> None:
    model = make_model()
    model.config.save_pretrained(tmp_path)
    write(tmp_path, {**model.state_dict(), **(change or {})}, shards=1, new=True)
    if change is None:
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:-100])
    found = read_hf_config(tmp_path)
    with pytest.raises(ConfigError, match=rule):
        find_weights(found, found.model, padded_vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("file", "rule"),
    [
        ("adapter_config.json", "is an adapter of PEFT"),
        ("zero_to_fp32.py", "is a checkpoint of DeepSpeed"),
        (
            "pytorch_model_fsdp_0/.metadata",
            r"holds pytorch_model_fsdp_0, which is a folder of torch",
        ),
        ("notes.txt", "model.safetensors is missing"),
    ],
)
def test_a_configuration_beside_other_weights(tmp_path: Path, file: str, rule: str) -> None:
    make_model().config.save_pretrained(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    found = read_hf_config(tmp_path)
    with pytest.raises(ConfigError, match=f"^--load-hf {tmp_path}: {rule}"):
        find_weights(found, found.model, padded_vocab_size=VOCAB)
