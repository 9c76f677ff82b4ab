"""What ``--rope-type`` needs, and what has no effect without it; no torch."""

from __future__ import annotations

from cp_megatron.config import ModelConfig
from cp_megatron.config.fields import settings
from cp_megatron.errors import ConfigError
from cp_megatron.families.rope_fields import ROPE_FIELDS, ROPE_KEYS, fields_of


def check_rope(model: ModelConfig, seq_length: int, given: frozenset[str]) -> None:
    """The settings of rope fit one another, and each one typed has an effect.

    Raises:
        ConfigError: otherwise.
    """
    kind = model.rope_type
    if model.position_embedding_type != "rope":
        if kind != "default":
            rule = f"has no effect with --position-embedding-type {model.position_embedding_type}"
            raise ConfigError("--rope-type", kind, rule, "--position-embedding-type rope")
    elif "--max-position-embeddings" in given:
        _check_typed_length(model, seq_length)
    for name in sorted(ROPE_FIELDS - fields_of(kind)):
        flag = settings()[name].flag
        off = f"--no-{flag[2:]}" if settings()[name].kind == "bool" else flag
        if flag in given:
            works = ", ".join(t for t in ROPE_KEYS if name in fields_of(t))
            rule = f"has no effect with --rope-type {kind}"
            raise ConfigError(off, "", rule, f"--rope-type {works}")
    if kind in ("linear", "dynamic", "yarn", "llama3") and model.rope_scaling_factor is None:
        raise ConfigError("--rope-type", kind, "needs --rope-scaling-factor", "4")
    if kind in ("dynamic", "yarn", "llama3", "longrope"):
        _check_original(model, seq_length)
    if kind == "yarn":
        _check_yarn(model)
    elif kind == "llama3" and model.rope_high_freq_factor <= model.rope_low_freq_factor:
        rule = f"must be above --rope-low-freq-factor {model.rope_low_freq_factor:g}"
        raise ConfigError("--rope-high-freq-factor", model.rope_high_freq_factor, rule, "4")
    elif kind == "longrope":
        _check_lists(model)
    elif kind == "dynamic" and model.head_dim <= 2:
        rule = "raises the base by a power of d / (d - 2), so heads must be wider than 2"
        raise ConfigError("--rope-type", kind, rule, "--kv-channels 4")


def _check_typed_length(model: ModelConfig, seq_length: int) -> None:
    rows = model.max_position_embeddings
    if rows is not None and rows < seq_length:
        rule = f"must be at least --seq-length {seq_length}"
        raise ConfigError("--max-position-embeddings", rows, rule, str(seq_length))


def _check_original(model: ModelConfig, seq_length: int) -> None:
    flag, value = "--original-max-position-embeddings", model.original_length
    if value is None:
        rule = f"needs the length the model was trained on: {flag}"
        raise ConfigError("--rope-type", model.rope_type, rule, str(seq_length))
    if value < 2:
        raise ConfigError(flag, value, "must be 2 or more", str(seq_length))


def _check_yarn(model: ModelConfig) -> None:
    if model.beta_fast < model.beta_slow:
        rule = f"must be at least --beta-slow {model.beta_slow:g}"
        raise ConfigError("--beta-fast", model.beta_fast, rule, "32")
    if (model.mscale is None) != (model.mscale_all_dim is None):
        flag = "--mscale" if model.mscale_all_dim is None else "--mscale-all-dim"
        value = model.mscale if model.mscale_all_dim is None else model.mscale_all_dim
        rule = "is read together with --mscale-all-dim only: give both or none"
        raise ConfigError(flag, value, rule, "--mscale 1 --mscale-all-dim 1")


def _check_lists(model: ModelConfig) -> None:
    pairs = model.head_dim // 2
    for flag, values in (
        ("--rope-short-factor", model.rope_short_factor),
        ("--rope-long-factor", model.rope_long_factor),
    ):
        if values is None or len(values) != pairs or not all(x > 0 for x in values):
            shown = "" if values is None else " ".join(f"{x:g}" for x in values[:8])
            rule = f"--rope-type longrope needs {pairs} positive numbers, one for each pair"
            raise ConfigError(flag, shown, rule, " ".join(["1"] * min(pairs, 8)))
