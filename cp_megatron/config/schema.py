"""What a run is: frozen, typed, keyword-only values. The command line is generated from them.

A field ``num_layers`` is the flag ``--num-layers``; its docstring is the flag's help. Names are
Megatron's wherever Megatron has one. ``None`` means "derived", and the property beside the field
says how. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cp_megatron.config.ranges import (
    AxisSize,
    BelowOne,
    Count,
    NonNegative,
    Positive,
    Range,
    Size,
)

Normalization = Literal["LayerNorm", "RMSNorm"]
PositionEmbedding = Literal["learned_absolute", "rope", "none"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
DecayStyle = Literal["constant", "linear", "cosine"]
Recompute = Literal["none", "selective", "full"]
DType = Literal["auto", "float64", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
TokenizerType = Literal["byte", "huggingface", "sentencepiece", "tiktoken"]
PackingKind = Literal["concatenate", "best-fit"]
Exchange = Literal["auto", "p2p", "all_gather", "a2a", "a2a+p2p"]
Route = Literal["auto", "ring", "direct"]
LayoutKind = Literal["auto", "contiguous", "zigzag", "balanced"]
KernelName = Literal[
    "auto",
    "reference",
    "cpu",
    "cuda",
    "cudnn",
    "flash_attn",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer."""

    num_layers: Size = 4
    """Number of transformer layers."""
    hidden_size: Size = 128
    """Width of the residual stream."""
    ffn_hidden_size: Size | None = None
    """Width of the MLP; by default 4 x hidden, with --swiglu 2/3 of that in multiples of 64."""
    num_attention_heads: Size = 4
    """Number of query heads."""
    num_query_groups: Size | None = None
    """Number of key/value heads (grouped-query attention); by default one per query head."""
    kv_channels: Size | None = None
    """Width of one head; by default hidden size / number of heads."""
    normalization: Normalization = "LayerNorm"
    """Normalization before attention, before the MLP and at the end."""
    norm_epsilon: Annotated[float, Range(0, 1)] = 1e-5
    """Added to the variance inside every normalization."""
    swiglu: bool = False
    """Gated SiLU in the MLP instead of GELU."""
    position_embedding_type: PositionEmbedding = "learned_absolute"
    """learned_absolute adds a learned vector per position, rope rotates queries and keys."""
    rotary_base: Annotated[float, Range(1, open_low=True)] = 10000.0
    """Base of the rotary frequencies."""
    rope_type: RopeType = "default"
    """How rotary frequencies are changed for sequences longer than the model was trained on."""
    rope_scaling_factor: Annotated[float, Range(1)] | None = None
    """How much longer than that, for every --rope-type but default; longrope works it out."""
    original_max_position_embeddings: Size | None = None
    """Tokens of the sequences the model was trained on before; by default
    --max-position-embeddings."""
    beta_fast: Annotated[float, Range(1e-30, 1e30)] = 32.0
    """Of yarn: pairs that turn this often in the original length keep their frequency."""
    beta_slow: Annotated[float, Range(1e-30, 1e30)] = 1.0
    """Of yarn: pairs that turn this often or less are slowed by the whole factor."""
    mscale: NonNegative | None = None
    """Of yarn, with --mscale-all-dim: the two whose quotient is the attention factor."""
    mscale_all_dim: NonNegative | None = None
    """Of yarn, with --mscale."""
    rope_attention_factor: Positive | None = None
    """Of yarn and longrope: multiplies rotated queries and keys; by default worked out."""
    rope_truncate: bool = True
    """Of yarn: round the ends of its ramp outwards to whole pairs."""
    rope_low_freq_factor: Positive = 1.0
    """Of llama3: pairs that turn less often in the original length are slowed wholly."""
    rope_high_freq_factor: Positive = 4.0
    """Of llama3: pairs that turn more often in the original length keep their frequency."""
    rope_short_factor: tuple[float, ...] | None = None
    """Of longrope: a divisor for each pair of channels, up to the original length."""
    rope_long_factor: tuple[float, ...] | None = None
    """Of longrope: the same for longer documents."""
    max_position_embeddings: Size | None = None
    """Rows of the learned position table, by default the sequence length; with rope the longest
    sequence the model is made for, which an export repeats."""
    window_size: tuple[int, int] | None = None
    """Sliding window, LEFT RIGHT: a token attends LEFT tokens before itself and none after (RIGHT
    is 0 or -1); -1 is unlimited. By default there is none."""
    window_layers: tuple[int, ...] | None = None
    """The layers that have the window, numbered from 0; by default all of them."""
    hidden_dropout: BelowOne = 0.0
    """Dropout on the residual stream: after the embedding, the attention and the MLP."""
    attention_dropout: BelowOne = 0.0
    """Dropout on the attention probabilities; only --kernel reference has it."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer a weight of its own instead of the embedding's."""
    disable_bias_linear: bool = False
    """Linear layers without bias."""
    add_qkv_bias: bool = False
    """Biases on queries, keys and values, also with --disable-bias-linear."""
    qk_layernorm: bool = False
    """Normalize the channels of every query and key head before they are rotated."""
    init_method_std: Positive = 0.02
    """Standard deviation of the initial weights."""
    make_vocab_size_divisible_by: Size = 128
    """The vocabulary is padded to a multiple of this; the pad is never predicted."""
    vocab_size: Size | None = None
    """Tokens the model knows; by default those of the tokenizer, which must not be more."""

    @property
    def ffn_size(self) -> int:
        """The MLP's width after the default is filled in."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return max(64, 4 * self.hidden_size * 2 // 3 // 64 * 64)
        return 4 * self.hidden_size

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a vocabulary of this size; the same on every grid."""
        unit = self.make_vocab_size_divisible_by
        return -(-vocab_size // unit) * unit

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def row_window(self) -> tuple[int, int] | None:
        """The window of a row's mask; none where some layers see more than it."""
        every = self.window_layers is None or len(self.window_layers) == self.num_layers
        return self.window_size if every else None

    def layer_window(self, layer: int) -> tuple[int, int] | None:
        """The window of a layer, numbered from 0."""
        has_it = self.window_layers is None or layer in self.window_layers
        return self.window_size if has_it else None

    @property
    def original_length(self) -> int | None:
        """Tokens of the sequences before a context extension; None where nothing says it."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads after the default is filled in."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_dim(self) -> int:
        """Width of one head after the default is filled in."""
        if self.kv_channels is not None:
            return self.kv_channels
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is split over ranks. Data parallelism takes what the other two leave."""

    tensor_parallel_size: AxisSize = 1
    """Ranks that share every weight matrix."""
    context_parallel_size: AxisSize = 1
    """Ranks that share every sequence."""
    sequence_parallel: bool = False
    """Split the residual stream along the sequence over the tensor parallel ranks too."""
    cp_comm_type: Exchange = "auto"
    """How keys and values reach the queries: p2p sends what is read (the ring), all_gather gathers
    it at once, a2a trades tokens for heads, a2a+p2p does so among neighbours and sends between
    groups of them; auto takes what moves least and says why."""
    hierarchical_context_parallel_sizes: tuple[int, int] | None = None
    """Of a2a+p2p, A P: A neighbours trade heads, P groups send keys; A x P is the context parallel
    size."""
    cp_route: Route = "auto"
    """Of p2p and a2a+p2p: keys come from the neighbour (ring) or from their owner (direct); auto
    takes what moves less."""
    cp_layout: LayoutKind = "auto"
    """Which rank holds which part of a row: zigzag balances causal attention, balanced packed
    documents; auto chooses between the two."""
    cp_check_ranks: bool = True
    """Before a rank attends with a new mask, compare mask and shapes between the ranks (one small
    message), so that a mistake ends the run instead of hanging it."""
    kernel: KernelName = "auto"
    """The attention kernel of one device; auto chooses by device and dtype and says why."""
    distributed_timeout_minutes: Annotated[float, Range(0.01, 525_600)] = 10.0
    """A collective that waits longer than this ends the run."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how they are cut into rows."""

    data_path: tuple[str, ...] = ()
    """Text files or folders, .jsonl files, .bin/.idx prefixes, each after its weight if any has
    one: 0.7 A 0.3 B; by default the sources of Python's own standard library."""
    train_data_path: tuple[str, ...] = ()
    """The same for training only, instead of --data-path and --split."""
    valid_data_path: tuple[str, ...] = ()
    """The same for validation."""
    test_data_path: tuple[str, ...] = ()
    """The same for the test part."""
    split: str = "969,30,1"
    """Weights of the training, validation and test parts, e.g. 969,30,1."""
    tokenizer_type: TokenizerType = "byte"
    """byte: one token per byte of UTF-8 plus one for the end of a document; the others read
    --tokenizer-model."""
    tokenizer_model: str | None = None
    """A tokenizer's file, for huggingface also a model's folder; the byte tokenizer has none."""
    packing: PackingKind = "concatenate"
    """concatenate: rows are cut from the documents laid end to end; best-fit: a row has whole
    documents, what is left of it is padded, and documents are masked."""
    sft: bool = False
    """The data are conversations, a JSON object per line; only the assistant's answers have a
    loss."""
    skip_bad_lines: bool = False
    """Leave malformed lines of .jsonl files out, and say how many, instead of refusing them."""
    seq_length: Size = 2048
    """Tokens per row."""
    micro_batch_size: Size | None = None
    """Rows that go through the model at once; by default a rank's whole share of the batch."""
    global_batch_size: Size | None = None
    """Rows per training step over all ranks; by default one micro batch per data parallel rank."""
    pad_rows: bool = False
    """Pad rows that the ranks can not share evenly, by tokens without a loss, instead of refusing
    the sequence length."""
    document_mask: bool = False
    """Attention never crosses a document, and positions restart at each."""
    allow_data_change: bool = False
    """On --load, go on although the data is not the data the checkpoint was trained on."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: Positive = 3e-4
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: DecayStyle = "cosine"
    """Shape of the decay after the warm-up."""
    lr_warmup_iters: Count = 0
    """Steps over which the learning rate rises linearly from 0."""
    lr_decay_iters: Size | None = None
    """Step at which the decay ends; by default the last training step."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of the matrices; vectors (norms, biases) have none."""
    adam_beta1: BelowOne = 0.9
    """Decay of the mean of the gradients."""
    adam_beta2: BelowOne = 0.95
    """Decay of the mean of the squared gradients."""
    adam_eps: Positive = 1e-8
    """Added to the root of the second moment."""
    clip_grad: NonNegative = 1.0
    """Largest global norm of the gradient; 0 does not clip."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which precision, on which device."""

    train_iters: Size = 200
    """Training steps in all, those before a resume included."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1234
    """Everything random (weights, order of data, dropout) is a pure function of it."""
    dtype: DType = "auto"
    """Compute type; auto is bfloat16 on CUDA (float32 master weights) and float32 on CPU."""
    bf16: bool = False
    """The same as --dtype bfloat16."""
    deterministic: bool = False
    """The same grid repeats bit for bit on cuda too; on cpu it always does."""
    device: Device = "auto"
    """auto is cuda where every local rank has a GPU of its own, else cpu."""
    z_loss_coeff: NonNegative = 0.0
    """Train on this times the square of every token's log-sum-exp too, which keeps logits from
    drifting; the logged loss is without it."""
    skip_budget: Count = 5
    """A step whose loss or gradient is not finite changes nothing and is skipped, at most so many
    of any 1,000 steps in a row; one more ends the run."""
    spike_threshold: Positive | None = None
    """Skip a step too whose loss lies this many standard deviations (estimated robustly) above the
    median of the last 128; by default none."""
    check_interval: Size | None = None
    """Steps between two checks that parameters only change by updates, and that messages of
    context parallelism arrive as they were sent; saves are checked too. By default none."""
    log_interval: Size = 10
    """Steps between two lines of metrics; the first and the last step have one too."""
    eval_interval: Size | None = None
    """Steps between two validations; by default only at the end."""
    eval_iters: Count = 4
    """Global batches per validation; 0 never validates."""


LOGITS_BYTES = 256 << 20
"""Logits that exist at once, in float32, where nobody says of how many tokens: products of
thousands of rows are as fast as larger ones."""


def tokens_with_logits(chunk_size: int | None, width: int) -> int:
    """Tokens whose logits, of ``width`` columns, exist at once where ``chunk_size`` was asked."""
    return chunk_size or max(1, LOGITS_BYTES // (4 * width))


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is kept for backward, where, and how much of a sequence is in work at once."""

    recompute_granularity: Recompute = "none"
    """full: keep one tensor of each layer and compute the rest again; selective: keep the results
    of attention too, which is not computed again and sends nothing twice."""
    recompute_num_layers: Size | None = None
    """The first so many layers are recomputed; by default all of them."""
    mlp_tile_size: Size | None = None
    """Tokens that go through a layer's MLP at once; by default all."""
    loss_chunk_size: Size | None = None
    """Tokens whose logits exist at once; by default as many as fill 256 MiB."""
    cpu_offloading: bool = False
    """Move the one tensor that full recomputation keeps of each layer to the host, and back in time
    for backward; with --device cpu to a file among the system's temporary ones."""
    optimizer_cpu_offload: bool = False
    """Keep parameters, gradients and the optimizer's state on the host and update them there."""
    memory_report: bool = False
    """After the first step, say what each rank holds, kind by kind, predicted and measured."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where the run lies."""

    save: str | None = None
    """The run's folder; by default a fresh runs/<preset>-<n>, or with --load-hf
    runs/<folder>-<n>."""
    load: str | None = None
    """A run's folder (or its step-N) to go on from; its config.yaml supplies all other flags. auto:
    the folder of --save where that has a checkpoint, else begin."""
    load_hf: str | None = None
    """A Hugging Face folder whose config.json and safetensors the run starts from; without a
    --preset the learning rate is then 2e-5."""
    save_interval: Size | None = None
    """Steps between two checkpoints; by default only at the end or when interrupted."""
    async_save: bool = True
    """Checkpoints are copied, and written while the training goes on."""
    keep_latest_k: Size | None = None
    """Remove older checkpoints than so many of the newest; by default all stay."""
    save_retain_interval: Size | None = None
    """With --keep-latest-k: checkpoints whose step is a multiple of this stay too."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a person sees of the run, besides metrics.jsonl and TensorBoard."""

    wandb_project: str | None = None
    """Send the metrics to this project of Weights & Biases too; by default they stay here."""
    wandb_entity: str | None = None
    """The team or user that the project belongs to; by default that of the login."""
    wandb_exp_name: str | None = None
    """The name of the run there; by default that of its folder."""
    wandb_save_dir: str | None = None
    """Where Weights & Biases keeps its files; by default the run's folder."""
    log_straggler: bool = True
    """Name ranks that come late to a step, or whose device is slow, with the metrics."""
    plot: bool = True
    """Draw curves.png in the run's folder at the end, where matplotlib is installed."""
    profile: bool = False
    """Write a trace of a few steps, trace-rank<N>.json.gz, for https://ui.perfetto.dev."""
    profile_step_start: int = 10
    """Steps finished when the profile begins; the one before warms the profiler up."""
    profile_step_end: int = 12
    """Steps finished when the profile ends."""
    profile_ranks: tuple[int, ...] = (0,)
    """The ranks that write a trace."""
    profile_memory: bool = False
    """What is allocated and freed is in the trace too."""
    pytorch_profiler_collect_shapes: bool = False
    """The shapes of every operation's inputs are in the trace too."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    preset: str = "toy"
    """Where defaults come from: toy, toy-gpt, gpt2-small, llama-1b or llama3-8b."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
