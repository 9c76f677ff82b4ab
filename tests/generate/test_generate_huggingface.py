"""Greedy generation from Hugging Face folders equals ``generate`` of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.families.registry import read_hf_config
from cp_megatron.generate import decode as generate_module
from cp_megatron.generate.decode import Sampling, Session
from cp_megatron.model import Transformer

transformers = pytest.importorskip("transformers")

PROMPTS = ([5, 17, 99, 3, 3, 42, 7, 64, 12], [(7 * i * i + i) % 151 for i in range(21)])
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 4.0],
        "factor": 2.0,
        "original_max_position_embeddings": 16,
    },
}
ROPE_NAMES = {"rope_type", *(name for more in ROPE.values() for name in more)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama-{kind}": ("Llama", {"rope_type": kind, **more}) for kind, more in ROPE.items()},
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen2-window-above": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3.5": (
        "Qwen3_5",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}


def saved(folder: Path, family: str, options: dict[str, Any]) -> Any:
    """Writes a random float64 model of transformers to ``folder``, and returns it."""
    options = dict(options)
    rope = {name: options.pop(name) for name in list(options) if name in ROPE_NAMES}
    torch.manual_seed(0)
    maker = getattr(transformers, f"{family}TextConfig", None)
    maker = maker or getattr(transformers, f"{family}Config")
    config = maker(**SIZES, **options)
    if rope:
        config.rope_parameters = {"rope_theta": 10000.0, **rope}
    model = getattr(transformers, f"{family}ForCausalLM")(config).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("A_log"):  # memories of about 30 tokens
                parameter.fill_(-3.0)
            elif parameter.ndim == 1:  # biases start as zeros, norms as ones
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def loaded(folder: Path) -> Session:
    """Loads the model from the folder."""
    found = read_hf_config(folder)
    model = Transformer(
        found.model,
        seq_length=16,
        vocab_size=found.vocab_size,
        tp=None,
        sequence_parallel=False,
    ).double()
    load_hf(folder, model=model)
    return Session(model=model.eval(), seq_length=16)


BY_DEFAULT = ("llama-yarn", "qwen2-window-above", "qwen3.5")


@pytest.mark.parametrize(
    "name",
    [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_greedy_generation_equals_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer or the prompt is longer than the 16 positions; prompts are read in parts."""
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 5)
    for prompt in PROMPTS:
        # A new model for each prompt, because its rope remembers the longest text.
        theirs = saved(tmp_path, *CASES[name])
        wanted = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        session = loaded(tmp_path)
        found = session.generate(prompt, max_new_tokens=24, stop=(), sampling=Sampling(), seed=0)
        assert list(found) == wanted
        assert len(set(wanted)) > 2, "the model does not just repeat one token"
