"""Settings of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cp_megatron.config.schema.ranges import BelowOne, NonNegative, Positive, Range, Size

Normalization = Literal["LayerNorm", "RMSNorm"]
PositionEmbedding = Literal["learned_absolute", "rope", "none"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer."""

    num_layers: Size = 4
    """Number of transformer layers."""
    hidden_size: Size = 128
    """Width of the residual stream."""
    ffn_hidden_size: Size | None = None
    """Width of the MLP; by default 4 x hidden size, or with --swiglu 2/3 of that, rounded down to a
    multiple of 64."""
    num_attention_heads: Size = 4
    """Number of query heads."""
    num_query_groups: Size | None = None
    """Number of key/value heads (grouped-query attention); by default one per query head."""
    kv_channels: Size | None = None
    """Width of one head; by default hidden size / number of heads."""
    normalization: Normalization = "LayerNorm"
    """Normalization before attention, before the MLP and at the end."""
    norm_epsilon: Annotated[float, Range(0, 1)] = 1e-5
    """Added to the variance in every normalization."""
    swiglu: bool = False
    """Use a gated SiLU in the MLP instead of GELU."""
    position_embedding_type: PositionEmbedding = "learned_absolute"
    """learned_absolute adds a learned vector per position; rope rotates queries and keys."""
    rotary_base: Annotated[float, Range(1, open_low=True)] = 10000.0
    """Base of the rotary frequencies."""
    rope_type: RopeType = "default"
    """How rotary frequencies change for sequences longer than the model was trained on."""
    rope_scaling_factor: Annotated[float, Range(1)] | None = None
    """Factor by which the context grows. Required for linear, dynamic, yarn and llama3; longrope
    derives it by default."""
    original_max_position_embeddings: Size | None = None
    """Length of the sequences that the model was trained on originally; by default
    --max-position-embeddings."""
    beta_fast: Annotated[float, Range(1e-30, 1e30)] = 32.0
    """For yarn: channel pairs with at least this many rotations over the original length keep their
    frequency."""
    beta_slow: Annotated[float, Range(1e-30, 1e30)] = 1.0
    """For yarn: the frequencies of channel pairs with at most this many rotations over the original
    length are divided by the full factor."""
    mscale: NonNegative | None = None
    """For yarn: the attention factor is computed from this and --mscale-all-dim."""
    mscale_all_dim: NonNegative | None = None
    """For yarn: the attention factor is computed from --mscale and this."""
    rope_attention_factor: Positive | None = None
    """For yarn and longrope: a factor on rotated queries and keys; by default derived."""
    rope_truncate: bool = True
    """For yarn: round the boundaries of the ramp outwards to whole channel pairs."""
    rope_low_freq_factor: Positive = 1.0
    """For llama3: the frequencies of channel pairs with fewer rotations than this over the original
    length are divided by the full factor."""
    rope_high_freq_factor: Positive = 4.0
    """For llama3: channel pairs with more rotations than this over the original length keep their
    frequency."""
    rope_short_factor: tuple[float, ...] | None = None
    """For longrope: one divisor per pair of channels, for documents up to the original length."""
    rope_long_factor: tuple[float, ...] | None = None
    """For longrope: one divisor per pair of channels, for longer documents."""
    max_position_embeddings: Size | None = None
    """Rows of the learned position table, by default the sequence length; with rope, the longest
    sequence that the model is made for, which an export records."""
    window_size: tuple[int, int] | None = None
    """Sliding window, LEFT RIGHT: a token attends to LEFT tokens before itself and to none after it
    (RIGHT is 0 or -1); -1 is unlimited. By default there is no window."""
    window_layers: tuple[int, ...] | None = None
    """The layers with the window, numbered from 0; by default all."""
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
    qk_layernorm: bool = False
    """Normalize the channels of every query and key head before the rotation."""
    init_method_std: Positive = 0.02
    """Standard deviation of the initial weights."""
    make_vocab_size_divisible_by: Size = 128
    """Pad the vocabulary to a multiple of this; padding is never predicted."""
    vocab_size: Size | None = None
    """Vocabulary size of the model; at least, and by default, the tokenizer's."""

    @property
    def ffn_size(self) -> int:
        """Width of the MLP, with the default filled in."""
        wide = 4 * self.hidden_size
        return self.ffn_hidden_size or (max(64, wide * 2 // 3 // 64 * 64) if self.swiglu else wide)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a vocabulary of this size; they do not depend on the grid."""
        unit = self.make_vocab_size_divisible_by
        return -(-vocab_size // unit) * unit

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def row_window(self) -> tuple[int, int] | None:
        """The window of every layer; None if some layers have none."""
        every = self.window_layers is None or len(self.window_layers) == self.num_layers
        return self.window_size if every else None

    def layer_window(self, layer: int) -> tuple[int, int] | None:
        """The window of a layer, numbered from 0."""
        has_it = self.window_layers is None or layer in self.window_layers
        return self.window_size if has_it else None

    @property
    def original_length(self) -> int | None:
        """Length of the sequences before a context extension; None if it is not given."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads, with the default filled in."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one head, with the default filled in."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads
