"""DCP and torchtitan folders and files of torch.save become Hugging Face folders bit for bit."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cp_megatron.checkpoint.convert import Conversion, convert
from cp_megatron.checkpoint.torch_import import import_torch
from cp_megatron.cli.parse import parse_arguments
from cp_megatron.cli.programs import CONVERT, ConversionOptions
from cp_megatron.config.files.foreign_folders import recognize
from cp_megatron.errors import ConfigError
from tests.checkpoint import meta_llama
from tests.ranks import run_ranks

TOKENS = torch.randint(0, meta_llama.VOCAB, (24,), generator=torch.Generator().manual_seed(2))
TABLE = torch.ones(4, 4, dtype=torch.complex64)
"""The rotary table, which old versions of torchtitan and of Meta's llama save."""
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with config.json and a tokenizer's file, but no weights."""
    return config_folder(tmp_path / "config")


def config_folder(folder: Path, **entries: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**meta_llama.CONFIG, **entries}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def save_dcp(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)


def training_state(model: dict[str, Any]) -> dict[str, Any]:
    """What torchtitan saves beside the model, whose tensors lie at the top."""
    moments = {f"optimizer.state.{name}.exp_avg": value * 2 for name, value in model.items()}
    others = {"lr_scheduler": {"last_epoch": 3}, "train_state": {"step": 3}}
    return {**model, **moments, **others, "freqs_cis": TABLE}


def save_sharded(rank: int, world_size: int, folder: Path) -> None:
    """Saves as torchtitan does: FSDP shards rows, TP rows or columns."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp_shard", "tp"))
    state: dict[str, Any] = {}
    for number, (name, value) in enumerate(meta_llama.weights().items()):
        inner = [Shard(0), Shard(value.ndim - 1), Replicate()][number % 3]
        state[name] = distribute_tensor(value, mesh, [Shard(0), inner])
    save_dcp(training_state(state), folder)
    dist.barrier()


def in_hf_order(rows: Tensor, num_heads: int) -> Tensor:
    """Row i of a head comes from row 2i, row d/2 + i from row 2i + 1."""
    heads = []
    for head in rows.view(num_heads, meta_llama.HEAD, -1):
        heads += [head[0::2], head[1::2]]
    return torch.cat(heads)


def in_hf_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The expected folder, tensor by tensor."""
    expected = {
        "model.embed_tokens.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["output.weight"],
    }
    for layer in range(meta_llama.LAYERS):
        at, to = f"layers.{layer}.", f"model.layers.{layer}."
        query, key = (state[f"{at}attention.w{part}.weight"] for part in "qk")
        expected |= {
            f"{to}self_attn.q_proj.weight": in_hf_order(query, meta_llama.HEADS),
            f"{to}self_attn.k_proj.weight": in_hf_order(key, meta_llama.KV_HEADS),
            f"{to}self_attn.v_proj.weight": state[f"{at}attention.wv.weight"],
            f"{to}self_attn.o_proj.weight": state[f"{at}attention.wo.weight"],
            f"{to}mlp.gate_proj.weight": state[f"{at}feed_forward.w1.weight"],
            f"{to}mlp.up_proj.weight": state[f"{at}feed_forward.w3.weight"],
            f"{to}mlp.down_proj.weight": state[f"{at}feed_forward.w2.weight"],
            f"{to}input_layernorm.weight": state[f"{at}attention_norm.weight"],
            f"{to}post_attention_layernorm.weight": state[f"{at}ffn_norm.weight"],
        }
    return expected


def assert_same(folder: Path, expected: dict[str, Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_torchtitan(config: Path, tmp_path: Path, world_size: int) -> None:
    run_ranks(save_sharded, world_size, tmp_path / "step-3")
    out = tmp_path / "out"
    left_out = import_torch(tmp_path / "step-3", config, out)
    assert left_out == ("lr_scheduler", "optimizer", "train_state")
    assert_same(out, in_hf_names(meta_llama.weights()))
    assert (out / "tokenizer_config.json").is_file()
    numel = sum(value.numel() for value in meta_llama.weights().values())
    size = sum(path.stat().st_size for path in out.iterdir())
    assert Conversion(folder=out, left_out=left_out).report().splitlines() == [
        f"written  {out}",
        "format   Hugging Face folder, LlamaForCausalLM, safetensors in float32",
        f"size     {numel:,} parameters, {size:,} bytes ({size / 1e6:,.1f} MB) in 3 files",
        "left out lr_scheduler, optimizer, train_state: a folder holds weights only",
    ]


@needs_transformers
def test_the_logits_are_those_of_the_source(config: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_dcp(meta_llama.weights(), tmp_path / "step-3")
    import_torch(tmp_path / "step-3", config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double()
    # Its rotary table is float32.
    with torch.no_grad():
        found = model(TOKENS[None]).logits[0]
    expected = meta_llama.logits(meta_llama.weights(), TOKENS)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


def newer_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of torchtitan in 2026, under compile and activation checkpointing."""
    state = {name.replace("attention.w", "attention.qkv_linear.w"): x for name, x in state.items()}
    state = {name.replace("qkv_linear.wo", "wo"): x for name, x in state.items()}
    state["lm_head.weight"] = state.pop("output.weight")
    wrapped = "_orig_mod._checkpoint_wrapped_module."
    return {name.replace("attention.", f"{wrapped}attention."): x for name, x in state.items()}


@pytest.mark.parametrize(
    ("prefix", "name"),
    [("", newer_names), ("model.", dict), ("app.model.", in_hf_names), ("module.", in_hf_names)],
)
def test_names(
    config: Path,
    tmp_path: Path,
    prefix: str,
    name: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    weights = meta_llama.weights(dtype=torch.bfloat16)
    state: dict[str, Any] = {prefix + key: value for key, value in name(weights).items()}
    outer = prefix.partition(".")[0] if prefix.count(".") > 1 else ""
    step = f"{outer}.optim.step" if outer else "optim.step"
    save_dcp({**state, step: torch.tensor(3)}, tmp_path / "dcp")
    left_out = import_torch(tmp_path / "dcp", config, tmp_path / "out", dtype="bfloat16")
    assert left_out == (step.removesuffix(".step"),)
    assert_same(tmp_path / "out", in_hf_names(weights))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_command_that_helps_does(config: Path, tmp_path: Path) -> None:
    """The answer to --load is a command line; run as it stands, it converts the folder."""
    save_dcp(training_state(meta_llama.weights()), tmp_path / "runs" / "step-3")
    answer = recognize("--load", tmp_path / "runs")
    assert answer is not None
    program, script, *words = shlex.split(answer.works.partition(", where MODEL")[0])
    assert (program, script) == ("python", "launch/convert.py")
    named = {"MODEL": str(config), "NEW": str(tmp_path / "new")}
    words = [named.get(word, word) for word in words]
    arguments = parse_arguments(words, program=CONVERT)
    assert isinstance(arguments.options, ConversionOptions)
    done = convert(arguments.config, arguments.options, given=arguments.given)
    assert "LlamaForCausalLM, safetensors in float32" in done.report()
    assert_same(tmp_path / "new", in_hf_names(meta_llama.weights()))


def test_qwen3_of_torchtitan_keeps_its_rows(tmp_path: Path) -> None:
    entries = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8}
    config = config_folder(tmp_path / "config", **entries)
    state = meta_llama.weights()
    expected = in_hf_names(state)
    for layer in range(meta_llama.LAYERS):
        at, to = f"layers.{layer}.attention.", f"model.layers.{layer}.self_attn."
        for part in "qk":
            state[f"{at}{part}_norm.weight"] = torch.randn(8)
            expected[f"{to}{part}_norm.weight"] = state[f"{at}{part}_norm.weight"]
            expected[f"{to}{part}_proj.weight"] = state[f"{at}w{part}.weight"]
    save_dcp(state, tmp_path / "dcp")
    import_torch(tmp_path / "dcp", config, tmp_path / "out")
    assert_same(tmp_path / "out", expected)


@pytest.mark.parametrize("new", [True, False])
def test_files_of_torch_save(config: Path, tmp_path: Path, new: bool) -> None:
    state = {**meta_llama.weights(), "rope.freqs": torch.ones(4), "freqs_cis": TABLE}
    # A transposed view, which shares its storage with another entry.
    state["output.weight"] = state["output.weight"].T.contiguous().T
    path = tmp_path / "consolidated.00.pth"
    content = state if new else {"model": state, "step": 3, "best": torch.ones(1)}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    assert import_torch(path, config, tmp_path / "out") == (() if new else ("best",))
    assert_same(tmp_path / "out", in_hf_names(meta_llama.weights()))


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    config = config_folder(tmp_path / "config", tie_word_embeddings=True)
    state = meta_llama.weights()
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ConfigError, match=r"output.weight differs .*tie_word_embeddings false"):
        import_torch(tmp_path / "m.pth", config, tmp_path / "out")
    expected = in_hf_names(state)
    del expected["lm_head.weight"]
    torch.save({**state, "output.weight": state["tok_embeddings.weight"]}, tmp_path / "m.pth")
    import_torch(tmp_path / "m.pth", config, tmp_path / "out")
    assert_same(tmp_path / "out", expected)


def _changed(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {**meta_llama.weights(), **changes}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "rule"),
    [
        ({"a": torch.ones(2)}, "holds neither model.embed_tokens.weight"),
        (_changed(**{"norm.weight": None}), "lacks norm.weight, which LlamaForCausalLM has"),
        (_changed(**{"norm.bias": torch.ones(32)}), "holds norm.bias, for which LlamaForCausalLM"),
        (
            _changed(**{"layers.2.ffn_norm.weight": torch.ones(32)}),
            "holds layers.2.ffn_norm.weight, for which",
        ),
        (
            _changed(**{"layers.1.attention.wk.weight": torch.ones(32, 32)}),
            r"wk.weight has the shape \[32, 32\], but by .*config.json it is \[16, 32\]",
        ),
        (
            _changed(**{"norm.weight": torch.ones(32, dtype=torch.int8)}),
            "norm.weight has the dtype int8",
        ),
        (
            {f"{x}.{k}": v for x in ("model", "ema") for k, v in meta_llama.weights().items()},
            r"holds 2 models \(model.\*, ema.\*\)",
        ),
    ],
)
def test_other_models_are_refused(
    config: Path, tmp_path: Path, state: dict[str, Tensor], rule: str
) -> None:
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match=f"^--from-torch .*m.pt: .*{rule}"):
        import_torch(tmp_path / "m.pt", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damages(data: bytes) -> Iterator[bytes]:
    """Ends too early, and bits that changed."""
    for place in range(0, len(data), max(1, len(data) // 40)):
        yield data[:place]
        yield data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


@pytest.mark.parametrize("kind", [".metadata", "__0_0.distcp", "new.pth", "old.pth"])
def test_damaged_bytes_never_crash_nor_run_on(config: Path, tmp_path: Path, kind: str) -> None:
    """A changed bit of a value cannot be noticed: torch stores no hash. All else is refused."""
    source = tmp_path / "dcp"
    save_dcp(meta_llama.weights(), source)
    file = source / kind
    if kind.endswith(".pth"):
        torch.save(meta_llama.weights(), file, _use_new_zipfile_serialization=kind == "new.pth")
    whole, refused = file.read_bytes(), 0
    for number, data in enumerate(damages(whole)):
        file.write_bytes(data)
        try:
            where = file if kind.endswith(".pth") else source
            import_torch(where, config, tmp_path / f"out-{number}")
        except ConfigError:
            refused += 1
            assert not (tmp_path / f"out-{number}").exists()
        else:
            assert len(data) == len(whole)
            shutil.rmtree(tmp_path / f"out-{number}")
    assert refused >= number // 2
