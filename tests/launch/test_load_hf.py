"""Extends the context of a Hugging Face folder and exports it, by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "pretrain.py")
SECONDS = 90.0

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("tokenizers") is None,
    reason="transformers is not installed: pip install '.[hf]'",
)


def run(folder: Path, *words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else [sys.executable]
    return subprocess.run(
        [*program, SCRIPT, *words],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def make_folder(folder: Path) -> None:
    """Writes a tiny Qwen3 with a byte-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate([*letters, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    config = Qwen3Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
        eos_token_id=256,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')


@pytest.mark.slow
def test_a_context_is_extended_and_handed_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from cp_megatron.checkpoint.hf_export import export_hf

    make_folder(tmp_path / "base")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("A sentence like many others. " * 400)
    words = [
        *("--load-hf", "base", "--data-path", "text", "--seq-length", "64", "--save", "run"),
        *("--rope-type", "yarn", "--rope-scaling-factor", "2", "--context-parallel-size", "2"),
        *("--train-iters", "2", "--global-batch-size", "2", "--eval-iters", "0"),
    ]
    ended = run(tmp_path, *words, ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert "rope (yarn x 2)" in ended.stdout
    assert "huggingface, 260 tokens padded to 384" in ended.stdout

    monkeypatch.chdir(tmp_path)  # the run's paths are as they were typed
    out = export_hf(Path("run"), Path("out"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 2.0)
    assert rope["original_max_position_embeddings"] == 32
    assert model.config.max_position_embeddings == 64
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 256
    tokenizer = (tmp_path / "base" / "tokenizer.json").read_text()
    assert (out / "tokenizer.json").read_text() == tokenizer

    # The run stores its model, so the weights that it started from are not needed again.
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()
    ended = run(tmp_path, "--load", "run", "--train-iters", "3", ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "step-3").is_dir()


def test_a_shard_that_is_missing_is_one_line(tmp_path: Path) -> None:
    make_folder(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    ended = run(tmp_path, "--load-hf", "base")
    assert ended.returncode == 2
    assert "--load-hf base: model.safetensors is missing" in ended.stderr
