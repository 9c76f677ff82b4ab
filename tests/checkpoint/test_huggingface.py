"""Models of transformers load on several grids with equal logits, and are exported bit for bit."""

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
from torch import Tensor, nn

from cp_megatron.checkpoint import hf_load
from cp_megatron.checkpoint.hf_export import export_hf
from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import Config
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import read_hf_config
from cp_megatron.model import Transformer, build_model
from cp_megatron.plan import Grid, Mask
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
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (architecture, options)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama, one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama, biases, linear": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        },
    ),
    "llama, tied, llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, longrope": ("Llama", {"rope_parameters": LONG}),
    "mistral, window, head_dim": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2, tied, yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2, window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen2, window above": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3, window between": (
        "Qwen3",
        {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3, dynamic": (
        "Qwen3",
        {
            "head_dim": 16,
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
        },
    ),
    "qwen3, one kv head": ("Qwen3", {"head_dim": 12, "num_key_value_heads": 1}),
}
GRIDS = {"one": Grid(), "tp2 cp2": Grid(tp=2, cp=2), "cp4": Grid(cp=4), "tp4": Grid(tp=4)}


def make_model(name: str) -> Any:
    """Makes a model with fixed random weights, including biases and norms."""
    import transformers

    family, options = CASES[name]
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **options}, attn_implementation="eager"
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 + (weight.ndim == 1))
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case as transformers saves it; its logits are in a file beside the folder."""
    root = tmp_path_factory.mktemp("hf")
    for number, name in enumerate(CASES):
        model = make_model(name)
        folder = root / str(number)
        # Every second model is saved in shards.
        model.save_pretrained(folder, max_shard_size="20KB" if number % 2 else "1GB")
        with torch.no_grad():
            logits = model(input_ids=tokens(), use_cache=False).logits
        save_file({"logits": logits.contiguous()}, root / f"{number}.logits")
    return {name: root / str(number) for number, name in enumerate(CASES)}


def run_of(folder: Path, *, sequence_parallel: bool = False) -> Config:
    config = Config()
    model = replace(read_hf_config(folder).model, attention_dropout=0.0)
    parallel = replace(config.parallel, sequence_parallel=sequence_parallel)
    data = replace(config.data, seq_length=SEQ)
    return replace(config, model=model, data=data, parallel=parallel)


def load_on(folder: Path, grid: Grid, *, sp: bool = False) -> tuple[Transformer, ParallelGroups]:
    groups = ParallelGroups.create(grid, "cpu")
    model = build_model(
        run_of(folder, sequence_parallel=sp),
        groups,
        vocab_size=VOCAB,
        dtype="float32",
        device="cpu",
        initialize=False,
    )
    load_hf(folder, model=model)
    return model, groups


def logit_gaps(rank: int, world_size: int, folders: dict[str, Path], grid: Grid) -> dict[str, Any]:
    """Returns the largest difference of logits by case, relative to the largest logit."""
    gaps = {}
    for number, (name, folder) in enumerate(folders.items()):
        model, groups = load_on(folder, grid, sp=grid.tp > 1 and number % 2 == 0)
        cp = ContextParallel(groups.cp, Mask.causal(SEQ, model.config.row_window))
        with torch.no_grad():
            logits = model(cp.shard(tokens(), 1), cp=cp)
        logits = cp.gather(all_gather_dim(logits, -1, groups.tp), 1)
        expected = load_file(folder.with_suffix(".logits"))["logits"]
        assert logits[..., VOCAB:].eq(float("-inf")).all()
        gap = (logits[..., :VOCAB] - expected).abs().max() / expected.abs().max()
        gaps[name] = gap.item()
    return gaps


@pytest.mark.parametrize(
    "grid", ["one", "tp2 cp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("cp4", "tp4"))]
)
def test_logits_are_those_of_transformers(folders: dict[str, Path], grid: str) -> None:
    size = GRIDS[grid].world_size
    for gaps in run_ranks(logit_gaps, size, folders, GRIDS[grid]):
        assert set(gaps) == set(CASES)
        assert max(gaps.values()) < 1e-5, gaps


def save_steps(
    rank: int, world_size: int, folders: dict[str, Path], target: Path, grid: Grid
) -> None:
    """Saves every case as the checkpoint of a run."""
    for folder in folders.values():
        model, _ = load_on(folder, grid)
        save_checkpoint(
            target / folder.name,
            step=1,
            consumed=0,
            model=model,
            optimizer=None,
            config=run_of(folder),
            grid=grid,
            data_fingerprint="",
            vocab_size=VOCAB,
        )


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    run_ranks(save_steps, 4, folders, root, Grid(tp=2, cp=2))
    return {name: root / folder.name for name, folder in folders.items()}


@pytest.mark.parametrize("name", CASES)
def test_an_export_is_the_model_bit_for_bit(
    runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    out = export_hf(runs[name], tmp_path / "out", max_shard_bytes=30_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    original, ours = make_model(name), AutoModelForCausalLM.from_pretrained(out)
    assert type(ours).__name__ == type(original).__name__ or name == "mistral, no window"
    expected, found = original.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    kinds = [getattr(model.config, "layer_types", None) for model in (original, ours)]
    assert kinds[0] == kinds[1]
    with torch.no_grad():
        logits = [m(input_ids=tokens(), use_cache=False).logits for m in (original, ours.eval())]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_export_in_half_precision(runs: dict[str, Path], tmp_path: Path) -> None:
    out = export_hf(runs["llama"] / "step-1", tmp_path / "out", dtype="bfloat16")
    (file,) = out.glob("*.safetensors")
    expected = make_model("llama").to(torch.bfloat16).state_dict()
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


def test_a_rank_reads_only_its_part(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    total = sum(load_file(file)[key].nbytes for file, key in _keys(folder))
    replicated = 5 * SIZES["hidden_size"] * 4  # norms: whole on every tp rank
    assert sum(run_ranks(count_bytes, 4, folder, Grid(cp=4))) == total
    read = run_ranks(count_bytes, 4, folder, Grid(tp=2, cp=2))
    assert sum(read) == total + replicated
    assert max(read) < 0.3 * total


def _keys(folder: Path) -> list[tuple[Path, str]]:
    return [(file, key) for file in folder.glob("*.safetensors") for key in load_file(file)]


def test_half_precision_is_widened(folders: dict[str, Path], tmp_path: Path) -> None:
    model = make_model("llama").to(torch.bfloat16)
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
    make_model("llama").save_pretrained(source)
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


def norm_gradients(rank: int, world_size: int, folder: Path, grid: Grid, sp: bool) -> Any:
    """Returns the complete gradients of the norms of heads."""
    model, groups = load_on(folder, grid, sp=sp)
    cp = ContextParallel(groups.cp, Mask.causal(SEQ))
    logits = model(cp.shard(tokens(), 1), cp=cp)
    logits = all_gather_dim(logits, -1, groups.tp)[..., :VOCAB]
    weights = torch.linspace(-1, 1, SEQ)[cp.positions].view(1, -1, 1)
    (logits.log_softmax(-1)[..., 5:6] * weights).sum().div(grid.tp).backward()
    return {
        name: value.grad.full_tensor()
        for name, value in model.named_parameters()
        if "_norm." in name and value.grad is not None
    }


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("name", ["qwen3, dynamic", "qwen3, one kv head"])
def test_gradients_of_head_norms_under_tensor_parallelism(
    folders: dict[str, Path], name: str, sp: bool
) -> None:
    model: nn.Module = make_model(name)
    logits = model(input_ids=tokens(), use_cache=False).logits
    weights = torch.linspace(-1, 1, SEQ).view(1, -1, 1)
    (logits.log_softmax(-1)[..., 5:6] * weights).sum().backward()
    layer = model.model.layers[0].self_attn
    grid = Grid(tp=2, cp=2)
    for found in run_ranks(norm_gradients, 4, folders[name], grid, sp):
        for ours, theirs in (("query_norm", layer.q_norm), ("key_norm", layer.k_norm)):
            gradient = found[f"layers.0.attention.{ours}.weight"]
            torch.testing.assert_close(gradient, theirs.weight.grad, rtol=1e-4, atol=1e-4)
