"""Settings of a model whose MLPs are dense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from cp_megatron.config.schema.ranges import BelowOne, NonNegative, Positive, Range, Size

Normalization = Literal["LayerNorm", "RMSNorm"]
PositionEmbedding = Literal["learned_absolute", "rope", "none"]
NormPlacement = Literal["pre", "post", "both"]
NormBias = Literal["all", "residual", "none"]
QKNormScope = Literal["head", "each_head", "all_heads"]
SoftmaxType = Literal["vanilla", "off-by-one", "learnable"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True, kw_only=True)
class DenseModelConfig:
    """The transformer, but for mixtures of experts."""

    num_layers: Size = 4
    """Number of transformer layers."""
    hidden_size: Size = 128
    """Width of the residual stream."""
    ffn_hidden_size: Size | None = None
    """Width of the MLP; by default 4 x hidden size, or with --swiglu or --geglu 2/3 of that,
    rounded down to a multiple of 64."""
    num_attention_heads: Size = 4
    """Number of query heads."""
    num_query_groups: Size | None = None
    """Number of key/value heads (grouped-query attention); by default one per query head."""
    kv_channels: Size | None = None
    """Width of one head; by default hidden size / number of heads."""
    v_head_dim: Size | None = None
    """Width of a head's values; by default that of its keys, or 128 with
    --multi-latent-attention."""
    multi_latent_attention: bool = False
    """Compute keys and values from a latent vector per token (DeepSeek-V2, arXiv:2405.04434)."""
    q_lora_rank: Size | None = None
    """Width of the latent that queries are computed from under --multi-latent-attention. By default
    they are computed from the residual stream."""
    kv_lora_rank: Size = 512
    """Width of the latent that keys and values are computed from under --multi-latent-attention."""
    qk_head_dim: Size = 128
    """Number of channels of a head that are not rotated under --multi-latent-attention."""
    qk_pos_emb_head_dim: Size = 64
    """Number of channels of a head that are rotated under --multi-latent-attention. All heads share
    the rotated channels of their keys."""
    latent_norm_epsilon: Annotated[float, Range(0, 1)] | None = None
    """Number that the norms of latents add to the variance; by default --norm-epsilon. These norms
    need --multi-latent-attention and --qk-layernorm."""
    normalization: Normalization = "LayerNorm"
    """Kind of the norms of attention, of the MLP and after the last layer."""
    norm_placement: NormPlacement = "pre"
    """Normalize the input of attention and of the MLP (pre), their output (post), or both."""
    norm_epsilon: Annotated[float, Range(0, 1)] = 1e-5
    """Number that every norm adds to the variance."""
    norm_bias: NormBias = "all"
    """The LayerNorms that have a bias: all of them, those of the residual stream, or none."""
    apply_layernorm_1p: bool = False
    """Store the weights of norms minus 1, so that weight decay pulls their factors towards 1."""
    parallel_residual: bool = False
    """Compute attention and the MLP from the same normalized input, and add both to the residual
    stream."""
    swiglu: bool = False
    """Use a gated SiLU in the MLP instead of GELU."""
    geglu: bool = False
    """Use a gated GELU in the MLP instead of GELU."""
    position_embedding_type: PositionEmbedding = "learned_absolute"
    """learned_absolute adds a learned vector per position; rope rotates queries and keys."""
    rotary_base: Annotated[float, Range(1, open_low=True)] = 10000.0
    """Base of the rotary frequencies."""
    window_rotary_base: Annotated[float, Range(1, open_low=True)] | None = None
    """Base of the rotary frequencies of layers with a window, which --rope-type then does not
    change. By default all layers have the same frequencies."""
    rotary_percent: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Share of the channels of a head that are rotated; these are the first ones."""
    rotary_interleaved: bool = False
    """Rotate channel 2i with channel 2i + 1 instead of channel i with channel i + n / 2, where n is
    the number of rotated channels."""
    no_rope_layers: tuple[int, ...] | None = None
    """The layers, numbered from 0, that do not rotate queries and keys; by default none."""
    query_temperature_beta: NonNegative = 0.0
    """Multiply the queries at position p by 1 + this x ln(1 + floor(p / L)), where L is
    --original-max-position-embeddings, as Llama 4 and Ministral 3 do."""
    rope_type: RopeType = "default"
    """How rotary frequencies change for sequences longer than the model was trained on."""
    rope_scaling_factor: Annotated[float, Range(1)] | None = None
    """Factor by which the context grows. Required for linear, dynamic, yarn and llama3; longrope
    derives it by default."""
    original_max_position_embeddings: Size | None = None
    """Length of the sequences that the model was trained on originally; by default
    --max-position-embeddings."""
    beta_fast: Annotated[float, Range(1e-30, 1e30)] = 32.0
    """Yarn keeps the frequency of channel pairs that make at least this many rotations over the
    original length."""
    beta_slow: Annotated[float, Range(1e-30, 1e30)] = 1.0
    """Yarn divides the frequency of channel pairs that make at most this many rotations over the
    original length by the full factor."""
    mscale: NonNegative | None = None
    """Yarn computes the attention factor from this and --mscale-all-dim."""
    mscale_all_dim: NonNegative | None = None
    """Yarn computes the attention factor from --mscale and this. Under --multi-latent-attention it
    also computes the factor of the scores from this."""
    rope_attention_factor: Positive | None = None
    """Yarn and longrope multiply rotated queries and keys by this factor; by default they derive
    it."""
    rope_truncate: bool = True
    """Yarn rounds the boundaries of its ramp outwards to whole channel pairs."""
    rope_low_freq_factor: Positive = 1.0
    """Llama3 divides the frequency of channel pairs that make fewer rotations than this over the
    original length by the full factor."""
    rope_high_freq_factor: Positive = 4.0
    """Llama3 keeps the frequency of channel pairs that make more rotations than this over the
    original length."""
    rope_short_factor: tuple[float, ...] | None = None
    """Longrope divides the frequency of each channel pair by its number in this list, in documents
    up to the original length."""
    rope_long_factor: tuple[float, ...] | None = None
    """Longrope divides the frequency of each channel pair by its number in this list, in longer
    documents."""
    max_position_embeddings: Size | None = None
    """Rows of the learned position table, by default the sequence length; with rope, the longest
    sequence that the model is made for, which an export records."""
    window_size: tuple[int, int] | None = None
    """Sliding window, LEFT RIGHT: a token attends to LEFT tokens before itself and to none after it
    (RIGHT is 0 or -1); -1 is unlimited. By default there is no window."""
    window_layers: tuple[int, ...] | None = None
    """The layers with the window, numbered from 0; by default all that attend."""
    linear_attention_freq: Size | None = None
    """Let every n-th layer attend, and make the others gated DeltaNets (arXiv:2412.06464), whose
    work grows linearly with the sequence; 1 lets every layer attend, which is the default."""
    linear_attention_layers: tuple[int, ...] | None = None
    """The layers, numbered from 0, that are gated DeltaNets, instead of --linear-attention-freq."""
    linear_num_key_heads: Size = 16
    """Number of query heads, and of key heads, of a gated DeltaNet."""
    linear_num_value_heads: Size = 32
    """Number of value heads of a gated DeltaNet, a multiple of its key heads. Each has a state."""
    linear_key_head_dim: Size = 128
    """Width of the queries and keys of one head of a gated DeltaNet."""
    linear_value_head_dim: Size = 128
    """Width of the values of one head of a gated DeltaNet."""
    linear_conv_kernel_dim: Size = 4
    """Number of tokens that the convolution before a gated DeltaNet reads."""
    hidden_dropout: BelowOne = 0.0
    """Dropout on the residual stream: after the embedding, the attention and the MLP."""
    attention_dropout: BelowOne = 0.0
    """Dropout on the attention probabilities; only --kernel reference supports it."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight instead of the embedding's."""
    disable_bias_linear: bool = False
    """Use linear layers without bias."""
    add_qkv_bias: bool = False
    """Add biases to queries, keys and values even with --disable-bias-linear."""
    add_attention_output_bias: bool = False
    """Add a bias to the output of attention even with --disable-bias-linear."""
    add_mlp_bias: bool = False
    """Add biases to the MLP even with --disable-bias-linear."""
    qk_layernorm: bool = False
    """Normalize queries and keys before the rotation; with --multi-latent-attention, the latents
    instead."""
    qk_norm_scope: QKNormScope = "head"
    """--qk-layernorm normalizes every head with one weight that all heads share (head) or with its
    own weight (each_head), or it normalizes all heads of a token as one vector (all_heads)."""
    attention_output_gate: bool = False
    """Multiply what attention returns by the sigmoid of a further projection of what it reads."""
    softmax_scale: Positive | None = None
    """Multiply the attention scores by this; by default 1 / sqrt(width of a key). Under
    --multi-latent-attention, yarn with --mscale-all-dim multiplies the default by the square of its
    own factor."""
    softmax_type: SoftmaxType = "vanilla"
    """off-by-one adds 1 to the denominator of the attention softmax; learnable adds the exponential
    of a learned number per query head, an attention sink."""
    attn_logit_softcapping: Positive | None = None
    """Replace every attention score x by c tanh(x / c), where c is this bound."""
    final_logit_softcapping: Positive | None = None
    """Replace every logit x by c tanh(x / c), where c is this bound."""
    embedding_multiplier: Positive = 1.0
    """Multiply the token embeddings by this."""
    residual_multiplier: Positive = 1.0
    """Multiply what attention and the MLP add to the residual stream by this."""
    logit_multiplier: Positive = 1.0
    """Multiply the logits by this, before the softcap."""
    init_method_std: Positive = 0.02
    """Standard deviation of the initial weights."""
    make_vocab_size_divisible_by: Size = 128
    """Pad the vocabulary to a multiple of this; padding is never predicted."""
    vocab_size: Size | None = None
    """Vocabulary size of the model; at least, and by default, the tokenizer's."""
    hf_model_type: str | None = None
    """The Hugging Face family of an export by its model_type, such as phi3. By default it is the
    family of --load-hf, if that still has such a model, and otherwise the first that has one."""

    @property
    def ffn_size(self) -> int:
        """Width of the MLP, with the default filled in."""
        wide = 4 * self.hidden_size
        third = max(64, wide * 2 // 3 // 64 * 64)
        return self.ffn_hidden_size or (third if self.is_gated else wide)

    @property
    def is_gated(self) -> bool:
        """Whether MLPs have a gate."""
        return self.swiglu or self.geglu

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a vocabulary of this size; they do not depend on the grid."""
        unit = self.make_vocab_size_divisible_by
        return -(-vocab_size // unit) * unit

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.add_attention_output_bias or not self.disable_bias_linear

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the linear layers of the MLP have a bias."""
        return self.add_mlp_bias or not self.disable_bias_linear

    @property
    def row_window(self) -> tuple[int, int] | None:
        """The window of every layer; None if some layers have none."""
        every = self.window_layers is None or len(self.window_layers) == self.num_layers
        return self.window_size if every and not self.has_linear_layers else None

    @property
    def has_linear_layers(self) -> bool:
        """Whether some layers are gated DeltaNets."""
        if self.linear_attention_layers is not None:
            return bool(self.linear_attention_layers)
        return (self.linear_attention_freq or 1) > 1

    def is_linear(self, layer: int) -> bool:
        """Whether a layer, numbered from 0, is a gated DeltaNet and does not attend."""
        if self.linear_attention_layers is not None:
            return layer in self.linear_attention_layers
        return (layer + 1) % (self.linear_attention_freq or 1) != 0

    @property
    def has_attention_layers(self) -> bool:
        """Whether some layers attend."""
        if self.linear_attention_layers is not None:
            return len(set(self.linear_attention_layers)) < self.num_layers
        return (self.linear_attention_freq or 1) <= self.num_layers

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """The layers that are gated DeltaNets, numbered from 0."""
        layers = range(self.num_layers) if self.has_linear_layers else ()
        return tuple(filter(self.is_linear, layers))

    def layer_window(self, layer: int) -> tuple[int, int] | None:
        """The window of a layer, numbered from 0."""
        has_it = self.window_layers is None or layer in self.window_layers
        return self.window_size if has_it and not self.is_linear(layer) else None

    def layer_rotates(self, layer: int) -> bool:
        """Whether a layer, numbered from 0, rotates queries and keys."""
        rotates = layer not in (self.no_rope_layers or ()) and not self.is_linear(layer)
        return self.position_embedding_type == "rope" and rotates

    @property
    def original_length(self) -> int | None:
        """Length of the sequences before a context extension; None if it is not given."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads, with the default filled in."""
        groups = None if self.multi_latent_attention else self.num_query_groups
        return groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of the queries and keys of one head, with the default filled in."""
        if self.multi_latent_attention:
            return self.qk_head_dim + self.qk_pos_emb_head_dim
        return self.kv_channels or max(1, self.hidden_size // self.num_attention_heads)

    @property
    def value_dim(self) -> int:
        """Width of the values of one head, with the default filled in."""
        return self.v_head_dim or (128 if self.multi_latent_attention else self.head_dim)

    @property
    def latent_widths(self) -> tuple[int, int] | None:
        """Widths of the latent and of the rotary key that keys and values are expanded from; None
        without latent attention."""
        widths = self.kv_lora_rank, self.qk_pos_emb_head_dim
        return widths if self.multi_latent_attention else None

    @property
    def rotary_dim(self) -> int:
        """Number of channels of a head that are rotated; the checks of a run refuse odd numbers."""
        if self.multi_latent_attention:
            return self.qk_pos_emb_head_dim
        return int(self.head_dim * self.rotary_percent)

    @property
    def latent_epsilon(self) -> float:
        """The number that norms of latents add to the variance, with the default filled in."""
        own = self.latent_norm_epsilon
        return self.norm_epsilon if own is None else own

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores, with the default filled in."""
        if self.softmax_scale:
            return self.softmax_scale
        scaled = self.multi_latent_attention and self.rope_type == "yarn"
        growth = self.yarn_growth(self.mscale_all_dim) if scaled and self.mscale_all_dim else 1.0
        return growth**2 * self.head_dim**-0.5

    def yarn_growth(self, mscale: float) -> float:
        """The factor by which yarn lets queries and keys grow: 0.1 mscale ln(s) + 1, where s is the
        factor of the context (arXiv:2309.00071, section 3.4; ``mscale`` is DeepSeek's)."""
        factor = self.rope_scaling_factor or 1.0
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
