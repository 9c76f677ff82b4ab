"""The rules that the settings of a run must satisfy, one function per question.

Every function raises ``ConfigError`` with the flag, its value, the rule and the nearest values
that work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cp_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
)
from cp_megatron.config.fields import settings
from cp_megatron.data.rows.sampler import parse_split
from cp_megatron.errors import ConfigError


def refuse_unused(
    section: object, names: Iterable[str], given: frozenset[str], *, reason: str, works: str
) -> None:
    """Refuses flags that the user typed although they have no effect.

    Args:
        section: the section of the configuration that holds the values.
        names: the settings without an effect.
        given: the flags that the user typed.
        reason: why they have none, e.g. ``with --eval-iters 0``.
        works: what to type instead.
    """
    for name in names:
        row, value = settings()[name], getattr(section, name)
        if row.flag in given:
            flag = row.off_flag if value is False else row.flag
            shown = "" if row.kind == "bool" else _words(value)
            raise ConfigError(flag, shown, f"has no effect {reason}", works)


def check_model(model: ModelConfig, seq_length: int) -> None:
    """The heads fit the width and one another, and the positions fit the sequence."""
    heads, groups = model.num_attention_heads, model.num_kv_heads
    width, flag, unit = model.hidden_size, "--hidden-size", heads
    if model.kv_channels is not None:
        width, flag, unit = model.kv_channels, "--kv-channels", 1
    if width % unit and not model.multi_latent_attention:
        rule = f"must be divisible by --num-attention-heads {heads} unless --kv-channels is given"
        raise ConfigError(flag, width, rule, multiples(width, unit))
    if heads % groups:
        rule = f"must divide --num-attention-heads {heads}"
        raise ConfigError("--num-query-groups", groups, rule, nearest(divisors(heads), groups))
    rows = model.max_position_embeddings
    learned = model.position_embedding_type == "learned_absolute"
    if learned and rows is not None and rows < seq_length:
        rule = f"must be at least --seq-length {seq_length}"
        raise ConfigError("--max-position-embeddings", rows, rule, str(seq_length))
    whole = model.position_embedding_type == "rope" and model.rotary_dim == model.head_dim
    if whole and model.head_dim % 2:
        rule = f"rope rotates pairs of channels, so the head width {model.head_dim} must be even"
        raise ConfigError(flag, width, rule, multiples(width, 2 * unit))


def check_tensor_parallel(model: ModelConfig, tp: int, padded_vocab: int) -> None:
    """Every matrix that tensor parallelism splits can be split."""
    if rule := _head_rule(model, tp):
        most = max(model.num_attention_heads, model.linear_num_value_heads)
        sizes = [size for size in range(1, most + 1) if _splits(model, size, padded_vocab)]
        raise ConfigError("--tensor-parallel-size", tp, rule, nearest(sizes, tp))
    for flag, width in _widths(model).items():
        if width % tp:
            rule = f"must be divisible by --tensor-parallel-size {tp}"
            raise ConfigError(flag, width, rule, multiples(width, tp))
    if padded_vocab % tp:
        unit = model.make_vocab_size_divisible_by
        rule = (
            f"pads the vocabulary to {padded_vocab}, which --tensor-parallel-size {tp} must divide"
        )
        raise ConfigError("--make-vocab-size-divisible-by", unit, rule, str(math.lcm(unit, tp)))


def _head_rule(model: ModelConfig, tp: int) -> str:
    """The rule of heads that ``tp`` ranks break; empty if they can share all heads."""
    kinds = []
    if model.has_attention_layers:
        groups = "--num-query-groups", model.num_kv_heads
        kinds.append((("--num-attention-heads", model.num_attention_heads), groups))
    if model.has_linear_layers:
        groups = "--linear-num-key-heads", model.linear_num_key_heads
        kinds.append((("--linear-num-value-heads", model.linear_num_value_heads), groups))
    for (of_heads, heads), (of_groups, shared) in kinds:
        if heads % tp:
            return f"must divide {of_heads} {heads}"
        if shared % tp and tp % shared:
            return f"must divide {of_groups} {shared}, or be a multiple of it"
    return ""


def _splits(model: ModelConfig, tp: int, padded_vocab: int) -> bool:
    uneven = any(width % tp for width in (*_widths(model).values(), padded_vocab))
    return not (_head_rule(model, tp) or uneven)


def _widths(model: ModelConfig) -> dict[str, int]:
    """The widths of the MLPs that tensor parallel ranks share, by their flags."""
    shared = model.moe_shared_expert_intermediate_size
    widths = {} if shared is None else {"--moe-shared-expert-intermediate-size": shared}
    if len(model.expert_layers) < model.num_layers:
        widths["--ffn-hidden-size"] = model.ffn_size
    return widths


def check_batch(data: DataConfig, dp: int) -> tuple[int, int, int]:
    """Rows per step over all ranks, rows of a micro batch, micro batches per step on each rank."""
    micro, rows = data.micro_batch_size, data.global_batch_size
    once = (micro or 1) * dp
    if rows is None:
        return once, micro or 1, 1
    if rows % once:
        size = f"--micro-batch-size {micro} x data parallel {dp} = {once}"
        rule = f"must be divisible by {size if micro else f'data parallel {dp}'}"
        raise ConfigError("--global-batch-size", rows, rule, multiples(rows, once))
    micro = micro or rows // dp
    return rows, micro, rows // (micro * dp)


def check_data(data: DataConfig, given: frozenset[str]) -> bool:
    """Whether there is data for validation; refuses flags about data that have no effect."""
    own = any((data.train_data_path, data.valid_data_path, data.test_data_path))
    if own:
        _check_own_paths(data, given)
    return bool(data.valid_data_path if own else parse_split(data.split)[1])


def _check_own_paths(data: DataConfig, given: frozenset[str]) -> None:
    """Each part has its own paths: nothing is split, and training needs some."""
    if data.data_path:
        rule = "contradicts --train-data-path and its like, which name the data of each part"
        raise ConfigError("--data-path", _words(data.data_path), rule, "one of the two")
    reason = "with --train-data-path and its like, which name the data of each part"
    refuse_unused(data, ["split"], given, reason=reason, works="leave it out")
    if not data.train_data_path:
        flag = "--valid-data-path" if data.valid_data_path else "--test-data-path"
        paths = data.valid_data_path or data.test_data_path
        raise ConfigError(flag, _words(paths), "needs training data too", "--train-data-path")


def with_packing(data: DataConfig, given: frozenset[str]) -> DataConfig:
    """The data with what ``--sft`` and ``--packing`` imply: best fit, and documents masked."""
    if data.sft and data.packing != "best-fit":
        if "--packing" in given:
            rule = "cuts conversations anywhere, which --sft does not allow"
            raise ConfigError("--packing", data.packing, rule, "--packing best-fit")
        data = replace(data, packing="best-fit")
    if data.packing == "best-fit" and not data.document_mask:
        if "--document-mask" in given:
            rule = "contradicts --packing best-fit, which always masks documents"
            raise ConfigError("--no-document-mask", "", rule, "--packing concatenate")
        data = replace(data, document_mask=True)
    return data


def check_saving(checkpoint: CheckpointConfig) -> None:
    """Flags about older checkpoints have an effect."""
    every = checkpoint.save_retain_interval
    if every is not None and checkpoint.keep_latest_k is None:
        rule = "has no effect unless --keep-latest-k is set, because all checkpoints are kept"
        raise ConfigError("--save-retain-interval", every, rule, "--keep-latest-k 3 with it")


def check_memory(memory: MemoryConfig, num_layers: int, given: frozenset[str]) -> None:
    """The layers to recompute exist, and so does the tensor to move."""
    number, level = memory.recompute_num_layers, memory.recompute_granularity
    if number is not None and number > num_layers:
        rule = f"must be at most --num-layers {num_layers}"
        raise ConfigError("--recompute-num-layers", number, rule, str(num_layers))
    if number is not None and level == "none":
        reason = "with --recompute-granularity none"
        works = "--recompute-granularity selective or full"
        refuse_unused(memory, ["recompute_num_layers"], given, reason=reason, works=works)
    if memory.cpu_offloading and level != "full":
        rule = "needs full recomputation, because it moves what this keeps per layer"
        raise ConfigError("--cpu-offloading", "", rule, "--recompute-granularity full")
    if memory.recompute_keeps_attention and level != "full":
        rule = "needs full recomputation; selective recomputation keeps these results as well"
        raise ConfigError("--recompute-keeps-attention", "", rule, "--recompute-granularity full")


def check_kernel_benchmark(config: Config) -> None:
    """The fastest kernel may be taken: none is asked for, and it may differ between runs."""
    parallel, flag = config.parallel, "--kernel-benchmark"
    if parallel.kernel_benchmark and parallel.kernel != "auto":
        rule = f"contradicts --kernel {parallel.kernel}"
        raise ConfigError(flag, True, rule, "--kernel auto, or without --kernel-benchmark")
    if parallel.kernel_benchmark and config.train.deterministic:
        rule = "contradicts --deterministic: another run may find another kernel fastest"
        raise ConfigError(flag, True, rule, "--kernel NAME instead")


def check_window(model: ModelConfig) -> None:
    """The window is one of a causal model, and the layers that have it exist."""
    _check_window_layers(model)
    if model.window_size is None:
        return
    left, right = model.window_size
    if left < -1 or right not in (0, -1):
        rule = "needs LEFT >= 0, or -1 for unlimited, and RIGHT 0 or -1: the model is causal"
        works = f"{max(left, -1)} 0"
        raise ConfigError("--window-size", _words(model.window_size), rule, works)


def _check_window_layers(model: ModelConfig) -> None:
    layers = model.window_layers
    if layers is None:
        return
    rule, works = misnumbered(layers, model.num_layers)
    if model.window_size is None or model.window_size[0] < 0:
        rule = "lists the layers with the window, but there is no window"
        works = "--window-size LEFT 0, or --window-layers None"
    elif not layers:
        rule, works = "names no layer", "no --window-size and no --window-layers"
    if rule:
        raise ConfigError("--window-layers", _words(layers), rule, works)


def misnumbered(layers: Sequence[int], num_layers: int) -> tuple[str, str]:
    """What is wrong with a list of layers, and a list that works; both empty if nothing is."""
    last = num_layers - 1
    if not all(0 <= layer <= last for layer in layers):
        rule = f"must be numbers from 0 to {last}, because there are {num_layers} layers"
        return rule, _words(range(0, num_layers, 2))
    if len(set(layers)) < len(layers):
        return "names a layer twice", _words(sorted(set(layers)))
    return "", ""


def multiples(value: int, unit: int) -> str:
    """The multiples of ``unit`` next to ``value``, for a message."""
    below = value // unit * unit
    return ", ".join(str(size) for size in (below, below + unit) if size)


def divisors(value: int) -> list[int]:
    """The divisors of a positive number, in order."""
    small = [size for size in range(1, math.isqrt(value) + 1) if not value % size]
    return sorted({*small, *(value // size for size in small)})


def nearest(sizes: Iterable[int], near: int, most: int = 6) -> str:
    """The sizes next to ``near``, at most so many, for a message."""
    nearest = sorted(sizes, key=lambda size: abs(size - near))[:most]
    return ", ".join(str(size) for size in sorted(nearest))


def _words(value: object) -> str:
    """A value as the command line spells it."""
    if isinstance(value, tuple | list | range):
        return " ".join(map(str, value))
    return str(value)
