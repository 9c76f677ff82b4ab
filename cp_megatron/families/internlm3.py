"""InternLM3: Llama with other names of the switches of biases."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    # The model's own code and transformers 5 name the two switches differently.
    attention = fields.switch("qkv_bias", fields.switch("attention_bias"))
    mlp = fields.switch("bias", fields.switch("mlp_bias"))
    if attention != mlp:
        why = "all linear layers have biases or none has, as in transformers"
        raise fields.unsupported("qkv_bias", str(mlp).lower(), why)
    return llama_like.read(fields, disable_bias_linear=not mlp)


INTERNLM3 = Family(
    model_type="internlm3",
    architecture="InternLM3ForCausalLM",
    classes=("LlamaForCausalLM",),
    read=_read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        "qkv_bias": not model.disable_bias_linear,
        "bias": not model.disable_bias_linear,
    },
    modules=llama_like.MODULES,
    defaults={"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    heads_divide_hidden_size=True,
)
