"""Tests scaled frequencies against those of transformers, and what they depend on."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from cp_megatron.config import ModelConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.families.rope_fields import ROPE_KEYS
from cp_megatron.model import Transformer
from cp_megatron.model.rope import Rotation
from cp_megatron.model.rope_scaling import rope_frequencies
from cp_megatron.plan import Mask
from cp_megatron.spec import RotarySpec

BASE = 50_000.0
LENGTH = 512
LISTS = {
    "short_factor": [1.0 + i / 9 for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, all of it": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, attention": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.3,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        **LISTS,
    },
}


def model_of(rope: dict[str, Any]) -> ModelConfig:
    fields = ROPE_KEYS[rope["rope_type"]]
    values = {field: rope[key] for key, field in fields.items() if key in rope}
    return ModelConfig(
        hidden_size=128,
        num_attention_heads=4,
        position_embedding_type="rope",
        rotary_base=BASE,
        max_position_embeddings=LENGTH,
        rope_type=rope["rope_type"],
        **values,
    )


def rotary_of(model: ModelConfig) -> RotarySpec:
    rotary = RotarySpec.of(model, layer=0)
    assert rotary is not None
    return rotary


def frequencies(model: ModelConfig, longest: int) -> tuple[torch.Tensor, float]:
    return rope_frequencies(model, rotary_of(model), longest)


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("longest", [64, LENGTH, 1000, 100_000])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str, longest: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = CASES[name]
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_theta": BASE, **rope},
    )
    inverse, attention = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=longest)
    our_inverse, our_attention = frequencies(model_of(rope), longest)
    assert ((our_inverse - inverse).abs() / inverse).max() < 1e-6
    assert abs(our_attention - attention) < 1e-6


def test_short_documents_keep_the_original_frequencies() -> None:
    dynamic = model_of(CASES["dynamic"])
    plain, _ = frequencies(replace(dynamic, rope_type="default"), 1)
    assert torch.equal(frequencies(dynamic, LENGTH)[0], plain)
    assert not torch.equal(frequencies(dynamic, LENGTH + 1)[0], plain)
    # The first pair turns fastest and yarn leaves it alone; the last is slowed by the factor.
    yarn = frequencies(model_of(CASES["yarn"]), 1)[0] / plain
    assert yarn[0] == 1
    assert yarn[-1].item() == pytest.approx(1 / 4)


def test_the_attention_factor_scales_what_is_rotated() -> None:
    config = model_of(CASES["yarn, attention"])
    rotation = Rotation.of(
        torch.tensor([5]), config, rotary_of(config), longest=9, dtype=torch.float64
    )
    x = torch.randn(1, 1, 1, 32, dtype=torch.float64)
    assert (rotation.keys(x).norm() / x.norm()).item() == pytest.approx(1.3)


def test_the_length_is_the_longest_documents_wherever_it_lies() -> None:
    """A row whose documents are short is rotated as if nothing were scaled."""
    config = replace(model_of(CASES["dynamic"]), num_layers=1, max_position_embeddings=8)
    logits = []
    for kind in ("dynamic", "default"):
        torch.manual_seed(0)
        model = Transformer(
            replace(config, rope_type=kind),
            seq_length=16,
            vocab_size=9,
            tp=None,
            sequence_parallel=False,
        )
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_()
        tokens = torch.arange(16).view(1, 16) % 9
        masks = Mask.documents([8, 8]), Mask.documents([4, 9, 3])
        logits.append([model(tokens, cp=ContextParallel(None, mask)) for mask in masks])
    (short, long), (short_plain, long_plain) = logits
    assert torch.equal(short, short_plain)
    assert not torch.equal(long[:, 4:13], long_plain[:, 4:13])
