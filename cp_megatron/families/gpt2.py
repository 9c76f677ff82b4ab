"""GPT-2: one tensor for queries, keys and values; linear layers that multiply from the right."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families.family import Family

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    # Folders of GPT-2 are not loaded, so this reads only what ``write`` writes.
    read=lambda fields: ModelConfig(
        num_layers=fields.size("n_layer"),
        hidden_size=fields.size("n_embd"),
        ffn_hidden_size=fields.size("n_inner"),
        num_attention_heads=fields.size("n_head"),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        max_position_embeddings=fields.size("n_positions"),
        untie_embeddings_and_output_weights=not fields.switch("tie_word_embeddings", True),
    ),
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
        "scale_attn_weights": True,
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
    heads_divide_hidden_size=True,
    loads=False,
)
