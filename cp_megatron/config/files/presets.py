"""Named configurations. A flag overrides any part of one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from cp_megatron.config.schema import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

_llama = partial(
    ModelConfig,
    normalization="RMSNorm",
    swiglu=True,
    position_embedding_type="rope",
    disable_bias_linear=True,
)
_llama3 = partial(_llama, num_attention_heads=32, num_query_groups=8, rotary_base=500_000.0)
_toy = partial(
    Config,
    data=DataConfig(seq_length=1024, global_batch_size=4),
    optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, lr_warmup_iters=10),
    train=TrainConfig(train_iters=120),
)
_long = partial(Config, train=TrainConfig(train_iters=100_000, eval_interval=1000))
_LONG_ROWS = DataConfig(seq_length=8192, micro_batch_size=1, global_batch_size=128)
# Models of 8 billion parameters or so.
_large = partial(
    _long,
    parallel=ParallelConfig(sequence_parallel=True),
    data=_LONG_ROWS,
    optimizer=OptimizerConfig(lr=3e-4, min_lr=3e-5, lr_warmup_iters=2000),
    memory=MemoryConfig(recompute_granularity="selective"),
)

# Llama style; four ranks on two CPU cores train it in about a minute.
_TOY = _toy(
    preset="toy",
    model=_llama(num_layers=2, hidden_size=192, num_attention_heads=4, num_query_groups=2),
)
# GPT style, of about the same size.
_TOY_GPT = _toy(preset="toy-gpt")

# Qwen3.5 style: three of four layers are gated DeltaNets.
_qwen3_5 = partial(
    _llama,
    linear_attention_freq=4,
    attention_output_gate=True,
    qk_layernorm=True,
    apply_layernorm_1p=True,
    rotary_percent=0.25,
    norm_epsilon=1e-6,
)
_TOY_QWEN3_5 = _toy(
    preset="toy-qwen3.5",
    model=_qwen3_5(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    ),
)
# The shape that transformers gives Qwen3.5 by default, with 9 billion parameters.
_QWEN3_5_9B = _large(
    preset="qwen3.5-9b",
    model=_qwen3_5(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=16,
        num_query_groups=4,
        kv_channels=256,
        rotary_base=10_000_000.0,
        untie_embeddings_and_output_weights=True,
    ),
)

# As many active parameters as the toy: a shared expert of half its width, and 2 of 16 experts that
# have a quarter each. The shared expert computes what tokens have in common while the router still
# sends almost all of them to the same experts. The factor makes the sum of two experts, whose
# weights sum to 1, as large as that of a dense MLP.
_TOY_MOE = _toy(
    preset="toy-moe",
    model=_llama(
        num_layers=2,
        hidden_size=192,
        num_attention_heads=4,
        num_query_groups=2,
        num_experts=16,
        moe_router_topk=2,
        moe_ffn_hidden_size=128,
        moe_shared_expert_intermediate_size=256,
        moe_router_topk_scaling_factor=2.0,
        moe_aux_loss_coeff=2e-2,
    ),
)
# Qwen3-30B-A3B (Yang et al. 2025, arXiv:2505.09388): 128 experts, of which a token has 8.
_QWEN3_30B_A3B = _large(
    preset="qwen3-30b-a3b",
    model=_llama(
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        kv_channels=128,
        qk_layernorm=True,
        norm_epsilon=1e-6,
        rotary_base=1_000_000.0,
        untie_embeddings_and_output_weights=True,
        num_experts=128,
        moe_router_topk=8,
        moe_ffn_hidden_size=768,
        moe_aux_loss_coeff=1e-3,
    ),
)

# The smallest model of Radford et al. 2019; with its own vocabulary of 50,257 tokens it has
# 124,439,808 parameters.
_GPT2_SMALL = _long(
    preset="gpt2-small",
    model=ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, hidden_dropout=0.1),
    data=DataConfig(seq_length=1024, micro_batch_size=4, global_batch_size=128),
    optimizer=OptimizerConfig(lr=6e-4, min_lr=6e-5, lr_warmup_iters=2000, adam_beta2=0.95),
)
# The shape of Llama 3.2 1B.
_LLAMA_1B = _long(
    preset="llama-1b",
    model=_llama3(num_layers=16, hidden_size=2048, ffn_hidden_size=8192),
    data=_LONG_ROWS,
    optimizer=OptimizerConfig(lr=4e-4, min_lr=4e-5, lr_warmup_iters=2000),
)
# Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783, table 3).
_LLAMA3_8B = _large(
    preset="llama3-8b",
    model=_llama3(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        untie_embeddings_and_output_weights=True,
    ),
)

# Megatron-LM's own defaults, but for dropout, which would be 0.1. It has no default for the sizes.
_MEGATRON = Config(
    preset="megatron",
    model=ModelConfig(
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        position_embedding_type="learned_absolute",
        rotary_base=10_000.0,
        init_method_std=0.02,
        make_vocab_size_divisible_by=128,
        moe_router_load_balancing_type="aux_loss",
    ),
    optimizer=OptimizerConfig(
        lr_decay_style="linear", weight_decay=0.01, adam_beta2=0.999, clip_grad=1.0
    ),
    train=TrainConfig(log_interval=100, eval_interval=1000, eval_iters=100),
)

PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        config.preset: config
        for config in (
            *(_TOY, _TOY_GPT, _TOY_QWEN3_5, _TOY_MOE, _GPT2_SMALL, _LLAMA_1B, _LLAMA3_8B),
            *(_QWEN3_5_9B, _QWEN3_30B_A3B, _MEGATRON),
        )
    }
)
"""The presets by name."""

DEFAULT_PRESET = "toy"
"""The preset of a command line that names none and says nothing about the model."""

MEGATRON_PRESET = "megatron"
"""The preset of a command line that names none and says something about the model."""
REQUIRED_SIZES = ("num_layers", "hidden_size", "num_attention_heads")
"""The settings of the model that have no default in Megatron-LM."""

PRETRAINED_OPTIMIZER = OptimizerConfig(lr=2e-5)
"""The optimizer of a run that starts from pretrained weights and names no preset. The learning
rate of a new model would destroy the weights."""
