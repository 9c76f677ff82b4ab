"""GPT-2: one tensor for queries, keys and values; linear layers that multiply from the right."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.llama_like import TANH_GELU


def _read(fields: JsonFields) -> ModelConfig:
    hidden = fields.size("n_embd")
    fields.only("activation_function", *TANH_GELU)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    fields.switch("reorder_and_upcast_attn")  # another order of the same computation
    for name in fields.value:
        if name.startswith("summary_"):
            fields.get(name)  # a setting of classes with another output layer
    fields.number("embd_pdrop")  # a run chooses its own dropout
    return ModelConfig(
        num_layers=fields.size("n_layer"),
        hidden_size=hidden,
        ffn_hidden_size=fields.size("n_inner", 4 * hidden),
        num_attention_heads=fields.size("n_head"),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        max_position_embeddings=fields.size("n_positions"),
        softmax_scale=None if fields.switch("scale_attn_weights", True) else 1.0,
        hidden_dropout=fields.number("resid_pdrop"),
        attention_dropout=fields.number("attn_pdrop"),
        init_method_std=fields.number("initializer_range", 0.02) or 0.02,
        untie_embeddings_and_output_weights=not fields.switch("tie_word_embeddings", True),
        vocab_size=fields.size("vocab_size"),
    )


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read=_read,
    write=lambda model, longest: {
        "n_positions": longest,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "activation_function": "gelu_new",  # the tanh approximation
        "layer_norm_epsilon": model.norm_epsilon,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "scale_attn_weights": model.score_scale != 1.0,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    },
    modules={
        "transformer.wte": "embedding",
        "transformer.wpe": "positions",
        "transformer.h.{}.ln_1": "layers.{}.attention_norm",
        "transformer.h.{}.attn.c_attn": "layers.{}.attention.query layers.{}.attention.key "
        "layers.{}.attention.value",
        "transformer.h.{}.attn.c_proj": "layers.{}.attention.out",
        "transformer.h.{}.ln_2": "layers.{}.mlp_norm",
        "transformer.h.{}.mlp.c_fc": "layers.{}.mlp.up",
        "transformer.h.{}.mlp.c_proj": "layers.{}.mlp.down",
        "transformer.ln_f": "norm",
        "lm_head": "head",
    },
    transposed=frozenset({"c_attn", "c_proj", "c_fc"}),
    defaults={
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),
    },
    heads_divide_hidden_size=True,
    base_prefix="transformer.",
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask
)
