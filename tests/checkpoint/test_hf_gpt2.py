"""Exports a model with the shape of GPT-2, saved on TP2 x CP2; transformers computes the same."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from cp_megatron.checkpoint import hf_export
from cp_megatron.checkpoint.hf_export import export_hf, gpt2_tokenizer_files
from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import Config, ModelConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.tokenize.open_tokenizer import open_tokenizer
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import read_hf_config, to_hf_config
from cp_megatron.model import Transformer, build_model
from cp_megatron.plan import Grid, Mask
from tests.checkpoint.toy import save_checkpoint
from tests.data import tokenizer_files
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)

VOCAB = 257
SEQ = 32
GPT2 = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=80, num_attention_heads=4)
CASES = {
    "tied": (GPT2, "float32", 1e-5),
    "untied, a longer table": (
        replace(GPT2, untie_embeddings_and_output_weights=True, max_position_embeddings=40),
        "float64",
        1e-10,
    ),
}


def run_of(model: ModelConfig) -> Config:
    config = Config()
    return replace(config, model=model, data=replace(config.data, seq_length=SEQ))


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(7))


def build(name: str, grid: Grid) -> tuple[Transformer, ParallelGroups]:
    config, dtype, _ = CASES[name]
    groups = ParallelGroups.create(grid, "cpu")
    options: dict[str, Any] = {"vocab_size": VOCAB, "dtype": dtype, "device": "cpu"}
    return build_model(run_of(config), groups, **options), groups


def logits_of(model: Transformer, groups: ParallelGroups) -> Tensor:
    cp = ContextParallel(groups.cp, Mask.causal(SEQ))
    with torch.no_grad():
        logits = model(cp.shard(tokens(), 1), cp=cp)
    return cp.gather(all_gather_dim(logits, -1, groups.tp), 1)[..., :VOCAB]


def loaded(rank: int, world_size: int, folder: Path, grid: Grid) -> Tensor:
    """Reads the model of a folder, and returns its logits [2, SEQ, VOCAB]."""
    groups = ParallelGroups.create(grid, "cpu")
    config = run_of(read_hf_config(folder).model)
    options: dict[str, Any] = {"vocab_size": VOCAB, "dtype": "float64", "device": "cpu"}
    model = build_model(config, groups, **options)
    load_hf(folder, model=model)
    return logits_of(model.eval(), groups)


def read_back(rank: int, world_size: int, folder: Path, name: str, grid: Grid) -> Tensor:
    """Reads an exported folder, and returns the logits [2, SEQ, VOCAB] of its weights."""
    model, groups = build(name, grid)
    load_hf(folder, model=model)
    return logits_of(model, groups)


def save(rank: int, world_size: int, folder: Path, name: str, grid: Grid) -> Tensor:
    """Saves random weights, and returns their logits [2, SEQ, VOCAB]."""
    model, groups = build(name, grid)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.state_dict().values():
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.2
            drawn += value.ndim == 1
            placed = torch.distributed.tensor.distribute_tensor(
                drawn, value.device_mesh, value.placements
            )
            value.to_local().copy_(placed.to_local())
    save_checkpoint(
        folder,
        step=1,
        consumed=0,
        model=model,
        optimizer=None,
        config=run_of(CASES[name][0]),
        grid=grid,
        data_fingerprint="",
        vocab_size=VOCAB,
    )
    return logits_of(model, groups)


@pytest.mark.slow  # by default tests/families compares GPT-2 with transformers on a grid of ranks
@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    _, dtype, bound = CASES[name]
    ours = run_ranks(save, 4, tmp_path / "run", name, Grid(tp=2, cp=2))[0]
    out = export_hf(tmp_path / "run", tmp_path / "out", dtype=dtype, max_shard_bytes=30_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    model, told = AutoModelForCausalLM.from_pretrained(
        out, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert not any(told.values()), told
    with torch.no_grad():
        theirs = model.eval()(input_ids=tokens(), use_cache=False).logits
    assert theirs.dtype == getattr(torch, dtype)
    assert (theirs - ours).abs().max() / theirs.abs().max() < bound
    assert model.config.n_positions == (40 if "table" in name else SEQ)


def test_no_more_than_a_tensor_of_the_folder_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(save, 4, tmp_path / "run", "tied", Grid(tp=2, cp=2))
    held: list[int] = []
    empty = torch.empty

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        held.append(made.nbytes)
        return made

    monkeypatch.setattr(hf_export.torch, "empty", counting)
    export_hf(tmp_path / "run", tmp_path / "out")
    assert max(held) == VOCAB * 32 * 4  # the embedding; every tensor is made once, as it is written
    assert sum(held) == sum(p.stat().st_size for p in [tmp_path / "out/model.safetensors"]) - (
        8 + int.from_bytes((tmp_path / "out/model.safetensors").read_bytes()[:8], "little")
    )


@pytest.mark.parametrize("name", CASES)
def test_fused_and_transposed_tensors_are_read_back(tmp_path: Path, name: str) -> None:
    """Each rank reads its part of queries, keys and values out of one transposed tensor."""
    grid = Grid(tp=2, cp=2)
    saved = run_ranks(save, 4, tmp_path / "run", name, grid)[0]
    out = export_hf(tmp_path / "run", tmp_path / "out", dtype=CASES[name][1])
    assert torch.equal(run_ranks(read_back, 4, out, name, grid)[0], saved)


@pytest.mark.parametrize("base", [False, True])
def test_a_folder_of_transformers_loads(tmp_path: Path, base: bool) -> None:
    """``base`` is like OpenAI's folder: it has no output layer, and masks among its tensors."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
    config = GPT2Config(vocab_size=VOCAB, **sizes, scale_attn_weights=base, n_inner=48)
    model = GPT2LMHeadModel(config).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(drawn * 0.3 + (weight.ndim == 1))
        expected = model(input_ids=tokens(), use_cache=False).logits
    model.save_pretrained(tmp_path)
    if base:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        tensors |= {"h.0.attn.bias": torch.ones(1, 1, 40, 40, dtype=torch.bool)}
        tensors |= {"h.1.attn.masked_bias": torch.tensor(-1e4)}
        save_file(tensors, tmp_path / "model.safetensors")
    ours = run_ranks(loaded, 4, tmp_path, Grid(tp=2, cp=2))[0]
    assert (ours - expected).abs().max() / expected.abs().max() < 1e-10


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"num_query_groups": 2}, "--num-query-groups"),
        ({"kv_channels": 16}, "--kv-channels"),
        ({"disable_bias_linear": True}, "--disable-bias-linear"),
        ({"qk_layernorm": True}, "--qk-layernorm"),
        ({"softmax_scale": 0.5}, "--softmax-scale"),
        ({"norm_bias": "none"}, "--norm-bias"),
        ({"window_size": (3, 0)}, "--window-size"),
    ],
)
def test_what_gpt2_has_no_place_for(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match="the nearest one, GPT2LMHeadModel") as caught:
        to_hf_config(replace(GPT2, **changes), vocab_size=VOCAB, seq_length=8, eod=256)
    assert caught.value.flag == flag


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer and the folder of an exported run with the byte tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bytes")
    if request.param == "gpt2":
        run_ranks(save, 1, folder / "run", "tied", Grid())
    else:
        run_ranks(save_llama, 1, folder / "run")
    out = export_hf(folder / "run", folder / "out")
    return AutoTokenizer.from_pretrained(out), out


def save_llama(rank: int, world_size: int, folder: Path) -> None:
    """Saves the toy run of the README before its first step."""
    from cp_megatron.config.files.presets import PRESETS

    config, grid = PRESETS["toy"], Grid()
    groups = ParallelGroups.create(grid, "cpu")
    model = build_model(config, groups, vocab_size=VOCAB, dtype="float32", device="cpu")
    save_checkpoint(
        folder,
        step=1,
        consumed=0,
        model=model,
        optimizer=None,
        config=config,
        grid=grid,
        data_fingerprint="",
        vocab_size=VOCAB,
    )


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_text_becomes_its_bytes(exported: Any, text: str) -> None:
    theirs, ours = exported[0], ByteTokenizer()
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text).tolist()
    assert theirs.decode(ids, skip_special_tokens=True) == text


@given(data=st.binary())
@settings(max_examples=200, deadline=None)
def test_bytes_become_the_same_text(exported: Any, data: bytes) -> None:
    ids = [*data, 256]
    assert exported[0].decode(ids, skip_special_tokens=True) == ByteTokenizer().decode(ids)


def test_the_end_of_a_document(exported: Any) -> None:
    tokenizer, out = exported
    assert tokenizer.eos_token_id == 256
    assert len(tokenizer) == VOCAB
    assert tokenizer("a<|endoftext|>")["input_ids"] == list(b"a<|endoftext|>")
    assert tokenizer.convert_ids_to_tokens([256]) == ["<|endoftext|>"]
    assert tokenizer.bos_token_id is None
    again = open_tokenizer("huggingface", str(out))
    assert (again.vocab_size, again.eod) == (VOCAB, 256)


def test_gpt2_files_become_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocab, merges = tokenizer_files.gpt2(tmp_path)
    ours = open_tokenizer("gpt2", None, vocab_file=str(vocab), merge_file=str(merges))
    for name, entries in gpt2_tokenizer_files(ours).items():
        tokenizer_files.write_json(tmp_path / name, entries)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat's <|endoftext|> 12", "", "naïve  €\n"):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert open_tokenizer("huggingface", str(tmp_path)).encode(text).tolist() == (
            ours.encode(text).tolist()
        )
    assert (theirs.eos_token_id, len(theirs)) == (ours.eod, ours.vocab_size)
