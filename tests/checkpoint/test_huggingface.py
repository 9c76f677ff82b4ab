"""What a rank reads of a Hugging Face folder, half precision, and folders that are refused.

That models load and are exported exactly is tested in ``tests/families/test_every_family.py``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cp_megatron.checkpoint import hf_load
from cp_megatron.checkpoint.hf_export import export_hf
from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import Config
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import read_hf_config
from cp_megatron.model import Transformer, build_model
from cp_megatron.plan import Grid
from tests.checkpoint.toy import save_checkpoint
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)

VOCAB = 300  # not a multiple of the padding
SEQ = 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def make_model(**options: Any) -> Any:
    """Makes a Llama with fixed random weights."""
    import transformers

    config = transformers.LlamaConfig(**SIZES, **options, attn_implementation="eager")
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 + (weight.ndim == 1))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers saves it."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    make_model().save_pretrained(folder)
    return folder


def run_of(folder: Path) -> Config:
    config = Config()
    model = replace(read_hf_config(folder).model, attention_dropout=0.0)
    return replace(config, model=model, data=replace(config.data, seq_length=SEQ))


def load_on(folder: Path, grid: Grid) -> tuple[Transformer, ParallelGroups]:
    groups = ParallelGroups.create(grid, "cpu")
    model = build_model(
        run_of(folder),
        groups,
        vocab_size=VOCAB,
        dtype="float32",
        device="cpu",
        initialize=False,
    )
    load_hf(folder, model=model)
    return model, groups


def save_step(rank: int, world_size: int, folder: Path, target: Path) -> None:
    """Saves the model as the checkpoint of a run."""
    model, _ = load_on(folder, Grid())
    save_checkpoint(
        target,
        step=1,
        consumed=0,
        model=model,
        optimizer=None,
        config=run_of(folder),
        grid=Grid(),
        data_fingerprint="",
        vocab_size=VOCAB,
    )


def test_an_export_in_half_precision(folder: Path, tmp_path: Path) -> None:
    run_ranks(save_step, 1, folder, tmp_path / "run")
    out = export_hf(tmp_path / "run" / "step-1", tmp_path / "out", dtype="bfloat16")
    (file,) = out.glob("*.safetensors")
    expected = make_model().to(torch.bfloat16).state_dict()
    for key, value in load_file(file).items():
        assert torch.equal(value, expected[key]), key
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def count_bytes(rank: int, world_size: int, folder: Path, grid: Grid) -> int:
    """Returns the bytes that this rank reads from the files."""
    reader = hf_load._FolderReader
    counted, read_box = 0, reader._read_box

    def counting(*args: Any) -> Tensor:
        nonlocal counted
        part = read_box(*args)
        counted += part.nbytes
        return part

    reader._read_box = counting  # type: ignore[method-assign]
    try:
        load_on(folder, grid)
    finally:
        reader._read_box = read_box  # type: ignore[method-assign]
    return counted


def test_a_rank_reads_only_its_part(folder: Path) -> None:
    total = sum(load_file(file)[key].nbytes for file, key in _keys(folder))
    replicated = 5 * SIZES["hidden_size"] * 4  # norms: whole on every tp rank
    assert sum(run_ranks(count_bytes, 4, folder, Grid(cp=4))) == total
    read = run_ranks(count_bytes, 4, folder, Grid(tp=2, cp=2))
    assert sum(read) == total + replicated
    assert max(read) < 0.3 * total


def _keys(folder: Path) -> list[tuple[Path, str]]:
    return [(file, key) for file in folder.glob("*.safetensors") for key in load_file(file)]


def test_half_precision_is_widened(tmp_path: Path) -> None:
    model = make_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    (weights,) = run_ranks(first_weight, 1, tmp_path / "half")
    assert weights.dtype == torch.float32
    assert torch.equal(weights[:VOCAB], model.model.embed_tokens.weight.float())
    assert not weights[VOCAB:].any()


def first_weight(rank: int, world_size: int, folder: Path) -> Tensor:
    model, _ = load_on(folder, Grid())
    whole: Tensor = next(iter(model.state_dict().values())).full_tensor()
    return whole


def refusals(rank: int, world_size: int, source: Path, folders: list[Path]) -> list[str]:
    """Loads each folder into the model of ``source``, and returns the error or ``loaded``."""
    groups = ParallelGroups.create(Grid(cp=world_size), "cpu")
    model = build_model(run_of(source), groups, vocab_size=VOCAB, dtype="float32", device="cpu")
    told = []
    for folder in folders:
        try:
            load_hf(folder, model=model)
            told.append("loaded")
        except ConfigError as error:
            told.append(str(error))
    return told


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {key: value.clone() for key, value in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return damage


def _index(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        keys = [key for _, key in _keys(folder)]
        text = json.dumps({"weight_map": dict.fromkeys(keys, name)})
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def _overlap(folder: Path) -> None:
    """Two tensors of one size share their bytes, so the bytes of one belong to no tensor."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    norms = [key for key in header if key.endswith("layernorm.weight")]
    last = max(norms, key=lambda key: header[key]["data_offsets"])
    header[norms[0] if norms[0] != last else norms[1]] = header[last]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    file.write_bytes(data[:8] + text + data[8 + size :])


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (_cut, "truncated"),
    "gone": (lambda folder: (folder / "model.safetensors").unlink(), "missing"),
    "a tensor less": (_rewrite(lambda t: t.pop(NORM)), f"lack {NORM}"),
    "a tensor more": (_rewrite(lambda t: t.update(more=torch.ones(2))), "holds more"),
    "a shape": (_rewrite(lambda t: t.update({NORM: torch.ones(31)})), r"has the shape \[31\]"),
    "a dtype": (
        _rewrite(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
        "dtype I8",
    ),
    "a way out": (_index("../model.safetensors"), "not the name of a file beside it"),
    "a shard missing": (_index("model-00009.safetensors"), "model-00009.safetensors is missing"),
    "no header": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
        "truncated, damaged or not",
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 99999),
        "not JSON",
    ),
    "tensors in one place": (_overlap, "truncated, damaged or not"),
    "another size": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"vocab_size": 300', '"vocab_size": 299')
        ),
        "embed_tokens",
    ),
}


def test_damaged_folders_are_refused_on_every_rank(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_model().save_pretrained(source)
    folders = []
    for number, (change, _) in enumerate(DAMAGES.values()):
        folders.append(tmp_path / str(number))
        shutil.copytree(source, folders[-1])
        change(folders[-1])
    first, second = run_ranks(refusals, 2, source, folders)
    assert first == second
    for folder, told, (name, (_, expected)) in zip(folders, first, DAMAGES.items()):
        assert told.startswith(f"--load-hf {folder}: "), name
        assert re.search(expected, told), (name, told)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        export_hf(tmp_path / "run", tmp_path)
    with pytest.raises(ConfigError, match="no finished checkpoint"):
        export_hf(tmp_path / "run", tmp_path / "out")
