"""The rules of rotary positions: what each ``--rope-type`` needs, and what it does not read."""

from __future__ import annotations

from collections.abc import Iterator

from cp_megatron.config import Config, ModelConfig
from cp_megatron.errors import ConfigError
from cp_megatron.families.rope_fields import ROPE_KEYS, fields_of, unread_fields
from cp_megatron.preflight.rules import refuse_unused

_EXTENDING = frozenset({"dynamic", "yarn", "llama3", "longrope"})
"""The types that extend positions beyond a length that they are told."""


def check_rope(model: ModelConfig, seq_length: int, given: frozenset[str]) -> None:
    """The settings of rope fit one another, and each one that is typed has an effect.

    Raises:
        ConfigError: otherwise.
    """
    kind = model.rope_type
    if model.position_embedding_type != "rope":
        reason = f"with --position-embedding-type {model.position_embedding_type}"
        works = "--position-embedding-type rope"
        refuse_unused(model, ["rotary_base"], given, reason=reason, works=works)
        if kind != "default":
            raise ConfigError("--rope-type", kind, f"has no effect {reason}", works)
    elif "--max-position-embeddings" in given:
        rows = model.max_position_embeddings
        if rows is not None and rows < seq_length:
            rule = f"must be at least --seq-length {seq_length}"
            raise ConfigError("--max-position-embeddings", rows, rule, str(seq_length))
    for name in sorted(unread_fields(model)):
        readers = ", ".join(other for other in ROPE_KEYS if name in fields_of(other))
        reason, works = f"with --rope-type {kind}", f"--rope-type {readers}"
        refuse_unused(model, [name], given, reason=reason, works=works)
    if kind in ("linear", "dynamic", "yarn", "llama3") and model.rope_scaling_factor is None:
        works = "--rope-scaling-factor 4 with it"
        raise ConfigError("--rope-type", kind, "needs --rope-scaling-factor", works)
    if kind in _EXTENDING:
        _check_original_length(model, seq_length)
    if kind == "yarn":
        _check_yarn(model)
    elif kind == "llama3" and model.rope_high_freq_factor <= model.rope_low_freq_factor:
        rule = f"must be above --rope-low-freq-factor {model.rope_low_freq_factor:g}"
        raise ConfigError("--rope-high-freq-factor", model.rope_high_freq_factor, rule, "4")
    elif kind == "longrope":
        _check_longrope(model)
    elif kind == "dynamic" and model.rotary_dim <= 2:
        rule = "raises the base to a power of d / (d - 2), so more than 2 channels must be rotated"
        flag = "--qk-pos-emb-head-dim" if model.multi_latent_attention else "--kv-channels"
        raise ConfigError("--rope-type", kind, rule, f"{flag} 4")


def rope_notes(config: Config, given: frozenset[str]) -> Iterator[str]:
    """A note if rows fit the positions that the model had before its rope was scaled.

    The rope of a model that is loaded is its own and must stay, so only what the command line or
    its file asks for is noted.
    """
    model, length = config.model, config.data.seq_length
    loaded = config.checkpoint.load is not None or config.checkpoint.load_hf is not None
    chosen = given & {"--rope-type", "--rope-scaling-factor", *(() if loaded else ("--config",))}
    original = model.original_length if model.rope_type in _EXTENDING else None
    if not chosen or original is None or length > original:
        return
    yield (
        f"--rope-type {model.rope_type} is not needed: rows of {length:,} tokens fit the "
        f"{original:,} positions without it (works: --rope-type default)"
    )


def _check_original_length(model: ModelConfig, seq_length: int) -> None:
    flag, value = "--original-max-position-embeddings", model.original_length
    if value is None:
        rule = f"needs the length that the model was trained on: {flag}"
        raise ConfigError("--rope-type", model.rope_type, rule, f"{flag} {seq_length}")
    if value < 2:
        raise ConfigError(flag, value, "must be at least 2", str(seq_length))


def _check_yarn(model: ModelConfig) -> None:
    if model.beta_fast < model.beta_slow:
        rule = f"must be at least --beta-slow {model.beta_slow:g}"
        raise ConfigError("--beta-fast", model.beta_fast, rule, "32")
    scales = {"--mscale": model.mscale, "--mscale-all-dim": model.mscale_all_dim}
    alone = {flag: value for flag, value in scales.items() if value is not None}
    scales_scores = model.multi_latent_attention and model.softmax_scale is None
    if len(alone) == 1 and not (scales_scores and model.mscale_all_dim):
        ((flag, value),) = alone.items()
        rule = "has an effect only with the other of --mscale and --mscale-all-dim"
        raise ConfigError(flag, value, rule, "--mscale 1 --mscale-all-dim 1")


def _check_longrope(model: ModelConfig) -> None:
    pairs = model.rotary_dim // 2
    for flag, values in (
        ("--rope-short-factor", model.rope_short_factor),
        ("--rope-long-factor", model.rope_long_factor),
    ):
        if values is None or len(values) != pairs or not all(x > 0 for x in values):
            shown = " ".join(f"{x:g}" for x in (values or ())[:8])
            rule = f"--rope-type longrope needs {pairs} positive numbers, one for each pair"
            raise ConfigError(flag, shown, rule, " ".join(["1"] * min(pairs, 8)))
