"""Phi-3, 3.5 and 4: Llama with fused projections, partial rotary and a window on all layers."""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_ORIGINAL = "original_max_position_embeddings"


def _read(fields: JsonFields) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.only(name, False)
    dropout = fields.number("resid_pdrop")
    if fields.number("embd_pdrop") != dropout:
        why = "resid_pdrop must be the same, because both are --hidden-dropout"
        raise fields.unsupported("embd_pdrop", f"{dropout:g}", why)
    fields.get(_ORIGINAL)  # transformers writes it, with or without longrope
    windows = llama_like.read_layer_windows(fields, llama_like.all_or_none(fields))
    model = llama_like.read(fields, hidden_dropout=dropout, **windows)
    if model.rope_type not in ("default", "longrope"):
        key = "rope_scaling" if fields.inner("rope_scaling").value else "rope_parameters"
        raise fields.unsupported(key, "longrope", "transformers' Phi-3 knows no other type")
    if model.rope_type == "longrope" and fields.get("head_dim") is not None:
        width = model.hidden_size // model.num_attention_heads
        why = "transformers counts the factors of longrope by hidden_size / num_attention_heads"
        fields.only("head_dim", width, why=why)
    return model


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    entries = llama_like.write(model, longest, partial=True)
    scaling = entries["rope_scaling"]
    if model.rope_type == "longrope" and _ORIGINAL in scaling:
        entries[_ORIGINAL] = scaling[_ORIGINAL]
        # transformers 4 accepts three keys and derives the factor from the two lengths. Version 5
        # prefers this object to rope_parameters, so a factor that does not follow from the lengths
        # is added to it, although version 4 then refuses the file.
        kept = {"short_factor", "long_factor", "attention_factor"}
        if scaling["factor"] != longest / scaling[_ORIGINAL]:
            kept.add("factor")
        short = {key: value for key, value in scaling.items() if key in kept}
        entries["rope_scaling"] = {"type": "longrope", **short}
    return entries | {
        "sliding_window": llama_like.window_width(model),
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
    }


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=_read,
    write=_write,
    modules={
        "model.embed_tokens": "embedding",
        "model.layers.{}.self_attn.qkv_proj": "layers.{}.attention.query layers.{}.attention.key "
        "layers.{}.attention.value",
        "model.layers.{}.self_attn.o_proj": "layers.{}.attention.out",
        "model.layers.{}.mlp.gate_up_proj": "layers.{}.mlp.gate layers.{}.mlp.up",
        "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down",
        "model.layers.{}.input_layernorm": "layers.{}.attention_norm",
        "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
        "model.norm": "norm",
        "lm_head": "head",
    },
    defaults={"rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0, _ORIGINAL: 4096},
)
