"""What the settings of a run must satisfy, one function per question; no torch.

Every function raises ``ConfigError`` with the flag, its value, the rule and the nearest values
that work, and returns nothing else than what it had to work out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from cp_megatron.config import (
    CheckpointConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from cp_megatron.data.rows.sampler import parse_split
from cp_megatron.errors import ConfigError


def check_model(model: ModelConfig, seq_length: int) -> None:
    """The heads fit the width and one another, the positions fit the sequence."""
    heads, groups = model.num_attention_heads, model.num_kv_heads
    if model.kv_channels is None and model.hidden_size % heads:
        rule = f"must be divisible by --num-attention-heads {heads}, or --kv-channels be given"
        raise ConfigError(
            "--hidden-size", model.hidden_size, rule, multiples(model.hidden_size, heads)
        )
    if heads % groups:
        rule = f"must divide --num-attention-heads {heads}"
        raise ConfigError("--num-query-groups", groups, rule, divisors(heads, groups))
    rows = model.max_position_embeddings
    learned = model.position_embedding_type == "learned_absolute"
    if learned and rows is not None and rows < seq_length:
        rule = f"must be at least --seq-length {seq_length}"
        raise ConfigError("--max-position-embeddings", rows, rule, str(seq_length))
    if model.position_embedding_type == "rope" and model.head_dim % 2:
        flag = "--hidden-size" if model.kv_channels is None else "--kv-channels"
        value = model.hidden_size if model.kv_channels is None else model.kv_channels
        step = 2 * heads if model.kv_channels is None else 2
        rule = f"rope turns pairs, so the head's width {model.head_dim} must be even"
        raise ConfigError(flag, value, rule, multiples(value, step))


def check_tensor_parallel(model: ModelConfig, tp: int, padded_vocab: int) -> None:
    """Every matrix that tensor parallelism splits can be split."""
    heads, groups = model.num_attention_heads, model.num_kv_heads
    if heads % tp:
        rule = f"must divide --num-attention-heads {heads}"
        both = [size for size in _divisors(heads) if _splits(model, size, padded_vocab)]
        raise ConfigError("--tensor-parallel-size", tp, rule, _nearest(both, tp))
    if groups % tp and tp % groups:
        rule = f"must divide --num-query-groups {groups}, or be a multiple of it"
        both = [size for size in _divisors(heads) if _splits(model, size, padded_vocab)]
        raise ConfigError("--tensor-parallel-size", tp, rule, _nearest(both, tp))
    if model.ffn_size % tp:
        rule = f"must be divisible by --tensor-parallel-size {tp}"
        raise ConfigError("--ffn-hidden-size", model.ffn_size, rule, multiples(model.ffn_size, tp))
    if padded_vocab % tp:
        unit = model.make_vocab_size_divisible_by
        rule = (
            f"pads the vocabulary to {padded_vocab}, which --tensor-parallel-size {tp} must divide"
        )
        raise ConfigError("--make-vocab-size-divisible-by", unit, rule, str(math.lcm(unit, tp)))


def _splits(model: ModelConfig, tp: int, padded_vocab: int) -> bool:
    groups = model.num_kv_heads
    fits = not groups % tp or not tp % groups
    return fits and not model.ffn_size % tp and not padded_vocab % tp


def check_batch(data: DataConfig, dp: int) -> tuple[int, int, int]:
    """Rows per step over all ranks, rows of a micro batch, micro batches per step on each rank."""
    micro, rows = data.micro_batch_size, data.global_batch_size
    if rows is None:
        return (micro or 1) * dp, micro or 1, 1
    once = (micro or 1) * dp
    if rows % once:
        factor = f"--micro-batch-size {micro} x " if micro else ""
        rule = f"must be divisible by {factor}data parallel {dp}"
        rule += f" = {once}" if micro else ""
        raise ConfigError("--global-batch-size", rows, rule, multiples(rows, once))
    micro = micro or rows // dp
    return rows, micro, rows // (micro * dp)


def check_schedule(optimizer: OptimizerConfig, train: TrainConfig, given: frozenset[str]) -> None:
    """The learning rate rises, then falls, within the run."""
    if optimizer.min_lr > optimizer.lr:
        rule = f"must be at most --lr {optimizer.lr:g}"
        raise ConfigError("--min-lr", optimizer.min_lr, rule, f"{optimizer.lr / 10:g}")
    end = train.train_iters if optimizer.lr_decay_iters is None else optimizer.lr_decay_iters
    end_flag = "--train-iters" if optimizer.lr_decay_iters is None else "--lr-decay-iters"
    warmup = optimizer.lr_warmup_iters
    # A short run of a preset with a longer warm-up ends while the rate still rises.
    if warmup >= end and ("--lr-warmup-iters" in given or "--lr-decay-iters" in given):
        rule = f"must be below {end_flag} {end}"
        raise ConfigError("--lr-warmup-iters", warmup, rule, str(end // 10))
    if optimizer.lr_decay_style == "constant":
        for flag in sorted(given & {"--min-lr", "--lr-decay-iters"}):
            value = optimizer.min_lr if flag == "--min-lr" else optimizer.lr_decay_iters
            rule = "has no meaning with --lr-decay-style constant"
            raise ConfigError(flag, value, rule, "--lr-decay-style cosine or linear")


def check_data(data: DataConfig, train: TrainConfig, given: frozenset[str]) -> bool:
    """Whether the run can validate; refuses flags about data that would have no effect."""
    own = any((data.train_data_path, data.valid_data_path, data.test_data_path))
    if own:
        _check_own_paths(data, given)
    valid = bool(data.valid_data_path) if own else parse_split(data.split)[1]
    if own and train.eval_iters and not valid and given & {"--eval-iters", "--eval-interval"}:
        rule = "reads the validation part, and there is none"
        raise ConfigError("--eval-iters", train.eval_iters, rule, "--valid-data-path")
    if train.eval_iters and not valid and given & {"--eval-iters", "--eval-interval"}:
        rule = "has no validation part, which --eval-iters and --eval-interval read"
        raise ConfigError("--split", data.split, rule, "969,30,1")
    if not train.eval_iters and "--eval-interval" in given:
        rule = "has no effect with --eval-iters 0"
        raise ConfigError("--eval-interval", train.eval_interval, rule, "--eval-iters 4")
    return bool(valid and train.eval_iters)


def _check_own_paths(data: DataConfig, given: frozenset[str]) -> None:
    """Each part has its own paths: nothing is split, and training needs some."""
    if data.data_path:
        rule = "is split into parts, but --train-data-path and its like name each part"
        raise ConfigError("--data-path", " ".join(data.data_path), rule, "one of the two")
    if "--split" in given:
        rule = "has no effect where --train-data-path and its like name each part"
        raise ConfigError("--split", data.split, rule, "leave it out")
    if not data.train_data_path:
        flag = "--valid-data-path" if data.valid_data_path else "--test-data-path"
        paths = data.valid_data_path or data.test_data_path
        rule = "needs data to train on beside it"
        raise ConfigError(flag, " ".join(paths), rule, "--train-data-path")


def with_packing(data: DataConfig, given: frozenset[str]) -> DataConfig:
    """What ``--sft`` and ``--packing`` bring with them: best fit, and documents masked."""
    if data.sft and data.packing != "best-fit":
        if "--packing" in given:
            rule = "cuts conversations anywhere, which --sft can not have"
            raise ConfigError("--packing", data.packing, rule, "--packing best-fit")
        data = replace(data, packing="best-fit")
    if data.packing == "best-fit" and not data.document_mask:
        if "--document-mask" in given:
            rule = "contradicts --packing best-fit, whose documents never see one another"
            raise ConfigError("--no-document-mask", "", rule, "--packing concatenate")
        data = replace(data, document_mask=True)
    return data


def check_saving(checkpoint: CheckpointConfig) -> None:
    """No flag about older checkpoints is without an effect."""
    every = checkpoint.save_retain_interval
    if every is not None and checkpoint.keep_latest_k is None:
        rule = "has no effect where all checkpoints stay"
        raise ConfigError("--save-retain-interval", every, rule, "--keep-latest-k 3 with it")


def check_memory(memory: MemoryConfig, num_layers: int, given: frozenset[str]) -> None:
    """What is recomputed and moved is there."""
    number, level = memory.recompute_num_layers, memory.recompute_granularity
    if number is not None and number > num_layers:
        rule = f"must be at most --num-layers {num_layers}"
        raise ConfigError("--recompute-num-layers", number, rule, str(num_layers))
    if number is not None and level == "none" and "--recompute-num-layers" in given:
        rule = "has no effect with --recompute-granularity none"
        works = "--recompute-granularity selective or full"
        raise ConfigError("--recompute-num-layers", number, rule, works)
    if memory.cpu_offloading and level != "full":
        rule = "moves the one tensor that full recomputation keeps of each layer"
        raise ConfigError("--cpu-offloading", "", rule, "--recompute-granularity full")


def check_positions(model: ModelConfig, given: frozenset[str]) -> None:
    """A base of rope where nothing is rotated."""
    if "--rotary-base" in given and model.position_embedding_type != "rope":
        rule = f"has no effect with --position-embedding-type {model.position_embedding_type}"
        raise ConfigError(
            "--rotary-base", model.rotary_base, rule, "--position-embedding-type rope"
        )


def check_window(model: ModelConfig) -> None:
    """A window of a causal model, and the layers that have it."""
    _check_window_layers(model)
    if model.window_size is None:
        return
    left, right = model.window_size
    if left < -1 or right not in (0, -1):
        rule = "needs LEFT >= 0, or -1 for unlimited, and RIGHT 0 or -1: the model is causal"
        works = f"{max(left, -1)} 0"
        raise ConfigError("--window-size", f"{left} {right}", rule, works)


def _check_window_layers(model: ModelConfig) -> None:
    layers = model.window_layers
    if layers is None:
        return
    shown = " ".join(map(str, layers))
    if model.window_size is None or model.window_size[0] < 0:
        rule = "says which layers have the window, and there is none"
        works = "--window-size LEFT 0, or --window-layers None"
        raise ConfigError("--window-layers", shown, rule, works)
    if not layers:
        rule = "names no layer"
        raise ConfigError("--window-layers", shown, rule, "no --window-size and no --window-layers")
    last = model.num_layers - 1
    if not all(0 <= layer <= last for layer in layers):
        rule = f"must be numbers from 0 to {last}, of --num-layers {model.num_layers}"
        raise ConfigError("--window-layers", shown, rule, " ".join(map(str, range(0, last + 1, 2))))
    if len(set(layers)) < len(layers):
        once = " ".join(str(layer) for layer in sorted(set(layers)))
        raise ConfigError("--window-layers", shown, "names a layer twice", once)


def multiples(value: int, unit: int) -> str:
    """The multiples of ``unit`` next to ``value``, for people."""
    below = value // unit * unit
    return ", ".join(str(size) for size in (below, below + unit) if size)


def divisors(value: int, near: int) -> str:
    """The divisors of ``value`` nearest to ``near``, for people."""
    return _nearest(_divisors(value), near)


def _divisors(value: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(value) + 1) if not value % size]
    return sorted({*small, *(value // size for size in small)})


def _nearest(sizes: Iterable[int], near: int, most: int = 6) -> str:
    nearest = sorted(sizes, key=lambda size: abs(size - near))[:most]
    return ", ".join(str(size) for size in sorted(nearest))
