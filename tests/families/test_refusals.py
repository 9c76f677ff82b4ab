"""What a user is told about a folder that no family reads, or a key that its family refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.errors import ConfigError
from cp_megatron.families.refusals import ADAPTER_SERVES
from cp_megatron.families.registry import FAMILIES, read_hf_config

SERVES = 'attn_implementation="cp_megatron" in transformers computes it'
UNKNOWN = 'attn_implementation="cp_megatron" in transformers is not known to compute it'
ALTERNATIVE = ', or attn_implementation="cp_megatron" in transformers)'
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def refusal(folder: Path, entries: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError) as caught:
        read_hf_config(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        (
            {"architectures": ["PhimoeForCausalLM"], "num_local_experts": 8},
            f"it is a mixture of 8 experts; {SERVES}",
        ),
        (
            {"architectures": ["MiniMaxM2ForCausalLM"], "num_local_experts": 32},
            f"it is a mixture of 32 experts; {SERVES}",
        ),
        (
            {"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 128},
            f"it is a mixture of 128 experts; {SERVES}",
        ),
        (
            {
                "architectures": ["Llama4ForConditionalGeneration"],
                "text_config": {"num_local_experts": 16},
            },
            "it is a mixture of 16 experts; it reads more than text; a folder of its language "
            f"model alone may be supported; {UNKNOWN}",
        ),
        ({"architectures": ["GPTNeoXForCausalLM"], "num_experts": 1}, f"supported: {SERVES}"),
        ({"model_type": "gpt_neox"}, f"supported: {SERVES}"),
        ({"architectures": ["MambaForCausalLM"]}, f"supported: {UNKNOWN}"),
        ({"model_type": "mamba"}, f"supported: {UNKNOWN}"),
    ],
)
def test_an_architecture_without_a_family(
    tmp_path: Path, entries: dict[str, Any], why: str
) -> None:
    told = refusal(tmp_path, entries)
    names = [x.model_type if "model_type" in entries else x.architecture for x in FAMILIES]
    assert told.endswith(f"{why} (works: {', '.join(names)})")


def test_a_key_that_its_family_refuses(tmp_path: Path) -> None:
    assert refusal(tmp_path, {**LLAMA, "hidden_act": "gelu"}).endswith(
        f'(works: "silu"{ALTERNATIVE}'
    )
    rope = {"rope_type": "linear", "factor": 2.0, "more": 1}
    assert refusal(tmp_path, {**LLAMA, "rope_scaling": rope}).endswith(ALTERNATIVE)
    # What is malformed, or no model of causal attention, does not run elsewhere either.
    for wrong in ({"hidden_size": 0}, {"is_causal": False}, {"quantization_config": {"bits": 4}}):
        assert "attn_implementation" not in refusal(tmp_path, {**LLAMA, **wrong})


def test_the_adapter_serves_what_the_trainer_does() -> None:
    assert len(ADAPTER_SERVES) > 90
    assert {"LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"} <= ADAPTER_SERVES
