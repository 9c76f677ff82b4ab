"""Tensors of mixtures of experts: read from a folder in every way of storing, and written again.

Nothing is computed. A module that only has the parameters stands for the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cp_megatron.checkpoint.hf_export import export_hf
from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.checkpoint.shard_reader import ShardReader
from cp_megatron.checkpoint.torch_import import import_torch
from cp_megatron.config import ModelConfig
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.config.schema import CheckpointConfig, Config
from cp_megatron.families.registry import read_hf_config
from cp_megatron.plan import Grid
from cp_megatron.spec import ModelSpec
from tests.checkpoint.toy import save_checkpoint
from tests.families.case import VOCAB
from tests.families.mixture_cases import MIXTURES
from tests.families.tiny_models import make_model, tensors_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)
Saved = Callable[[str], tuple[Path, dict[str, Tensor]]]
_GATE = "gate_up_proj"
STACKED = ("qwen3_moe", "mixtral", "deepseek_v3, groups of experts", "qwen3_5_moe_text")


class Bare(nn.Module):
    """The parameters and buffers of a model, all of them NaN, without its code."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        spec = ModelSpec.of(config, vocab_size=VOCAB, seq_length=64)
        for each in (*spec.parameters(), *spec.buffers()):
            *path, leaf = each.name.split(".")
            value = torch.full(each.shape, torch.nan)
            module = functools.reduce(_child, path, self)
            if any(each.name == buffer.name for buffer in spec.buffers()):
                module.register_buffer(leaf, value)
            else:
                module.register_parameter(leaf, nn.Parameter(value))


def _child(module: nn.Module, name: str) -> nn.Module:
    if name not in dict(module.named_children()):
        module.add_module(name, nn.Module())
    return module.get_submodule(name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A case as transformers saves it, and its tensors as transformers names them in memory."""

    @functools.cache
    def made(name: str) -> tuple[Path, dict[str, Tensor]]:
        folder, model = tmp_path_factory.mktemp("saved"), make_model(name)
        model.save_pretrained(folder, max_shard_size="30KB")
        return folder, model.state_dict()

    return made


def expected_experts(name: str, tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Gate, up and down of a layer [E, out, in], from transformers' own names."""
    (block,) = {key.rpartition(".")[0] for key in tensors if f".{layer}." in key and _GATE in key}
    fused, down = tensors[f"{block}.{_GATE}"], tensors[f"{block}.down_proj"]
    if name.startswith("gpt_oss"):  # transformers multiplies from the right
        return {
            "gate": fused[..., ::2].mT,
            "up": fused[..., 1::2].mT,
            "down": down.mT,
            "gate_bias": tensors[f"{block}.{_GATE}_bias"][:, ::2],
            "up_bias": tensors[f"{block}.{_GATE}_bias"][:, 1::2],
            "down_bias": tensors[f"{block}.down_proj_bias"],
        }
    gate, up = fused.chunk(2, 1)
    return {"gate": gate, "up": up, "down": down}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_folder_is_read_and_written_exactly(name: str, saved: Saved, tmp_path: Path) -> None:
    folder, tensors = saved(name)
    found = read_hf_config(folder)
    model = Bare(found.model)
    load_hf(folder, model=model)
    state = model.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    (layer, *_) = found.model.expert_layers
    for leaf, value in expected_experts(name, tensors, layer).items():
        assert torch.equal(state[f"layers.{layer}.mlp.experts.{leaf}"], value), leaf
    bias = f"layers.{layer}.mlp.router.expert_bias"
    theirs = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    assert (bias in state) == (theirs in tensors)
    assert bias not in state or torch.equal(state[bias], tensors[theirs])
    out = exported(model, tmp_path)
    told, written = tensors_of(folder), tensors_of(out)
    assert told.keys() == written.keys()
    for key, value in told.items():
        assert torch.equal(value, written[key]), key
    again = read_hf_config(out)
    assert again.family == found.family
    assert again.model == found.model


def exported(model: Bare, root: Path, **options: Any) -> Path:
    config = Config(
        preset="toy",
        model=model.config,
        data=replace(PRESETS["toy"].data, seq_length=64),
        checkpoint=CheckpointConfig(),
    )
    step = save_checkpoint(
        root / "step",
        step=1,
        consumed=0,
        model=model,
        optimizer=None,
        config=config,
        grid=Grid(),
        data_fingerprint="",
        vocab_size=VOCAB,
    )
    return export_hf(step, root / "out", max_shard_bytes=30_000, **options)


@pytest.mark.parametrize("name", STACKED)
def test_experts_may_be_stacked_in_a_folder(name: str, saved: Saved, tmp_path: Path) -> None:
    folder, tensors = saved(name)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({key: x.clone() for key, x in tensors.items()}, tmp_path / "model.safetensors")
    one, other = (Bare(read_hf_config(folder).model) for _ in range(2))
    load_hf(folder, model=one)
    load_hf(tmp_path, model=other)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3, groups of experts"])
def test_a_file_of_torch_has_the_names_of_transformers(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    folder, tensors = saved(name)
    torch.save({f"model.{key}": value for key, value in tensors.items()}, tmp_path / "model.pt")
    import_torch(tmp_path / "model.pt", folder, tmp_path / "out")
    one, other = (Bare(read_hf_config(folder).model) for _ in range(2))
    load_hf(folder, model=one)
    load_hf(tmp_path / "out", model=other)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_biases_of_experts_are_never_rounded(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("deepseek_v3, groups of experts")
    model = Bare(read_hf_config(folder).model)
    load_hf(folder, model=model)
    written = tensors_of(exported(model, tmp_path, dtype="bfloat16"))
    dtypes = {key.rpartition(".")[2]: value.dtype for key, value in written.items()}
    assert dtypes == {"weight": torch.bfloat16, "e_score_correction_bias": torch.float32}


def reads(rank: int, world_size: int, folders: dict[str, Path]) -> dict[str, tuple[bool, int]]:
    """Per case: whether the rank has its experts, and the elements of experts that it read."""
    mesh = init_device_mesh("cpu", (world_size,))
    return {name: reads_of(folder, mesh) for name, folder in folders.items()}


def reads_of(folder: Path, mesh: DeviceMesh) -> tuple[bool, int]:
    config = read_hf_config(folder).model
    whole, model = Bare(config), Bare(config)
    load_hf(folder, model=whole)
    for path, parameter in list(model.named_parameters()):
        module, _, leaf = path.rpartition(".")
        if module.endswith(".experts"):
            part = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
            setattr(model.get_submodule(module), leaf, part)
    sizes: list[int] = []
    opened = ShardReader._open

    def counted(self: ShardReader, file: str) -> Any:
        return _Counted(opened(self, file), sizes)

    with mock.patch.object(ShardReader, "_open", counted):
        load_hf(folder, model=model)
    right = all(
        torch.equal(x.to_local(), whole.state_dict()[key].chunk(mesh.size())[mesh.get_rank()])
        for key, x in model.state_dict().items()
        if isinstance(x, DTensor)
    )
    return right, sum(sizes)


class _Counted:
    """An open file that notes how many elements of experts are read."""

    def __init__(self, file: Any, sizes: list[int]) -> None:
        self._file, self._sizes = file, sizes

    def __enter__(self) -> _Counted:
        self._shard = self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def get_slice(self, key: str) -> Any:
        return _CountedSlice(self._shard.get_slice(key), self._sizes if "experts" in key else [])


class _CountedSlice:
    def __init__(self, stored: Any, sizes: list[int]) -> None:
        self._stored, self._sizes = stored, sizes

    def get_shape(self) -> list[int]:
        return list(self._stored.get_shape())

    def __getitem__(self, box: Any) -> Tensor:
        value: Tensor = self._stored[box]
        self._sizes.append(value.numel())
        return value


def test_a_rank_reads_only_its_own_experts(saved: Saved) -> None:
    names = ("qwen3_moe", "gpt_oss")
    folders = {name: saved(name)[0] for name in names}
    # Of qwen3_moe, two layers have experts. Gate and up alternate in gpt-oss, so that each of the
    # two is read with the other, but for one column.
    both = 2 * (2 * 48 - 1)
    whole = {"qwen3_moe": 2 * 8 * 3 * 20 * 32, "gpt_oss": 3 * 8 * (both * 33 + 48 * 32 + 32)}
    for told in run_ranks(reads, 2, folders):
        assert told == {name: (True, whole[name] // 2) for name in names}
