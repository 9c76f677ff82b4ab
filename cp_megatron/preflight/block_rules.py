"""The rules of a model's blocks: which variants of norms, heads, MLPs and positions go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from cp_megatron.config import ModelConfig
from cp_megatron.config.fields import settings
from cp_megatron.errors import ConfigError, Mistakes
from cp_megatron.families.qwen3_next import LINEAR_SIZES
from cp_megatron.families.registry import LATENT_WIDTHS
from cp_megatron.families.rope_fields import ROTARY_FIELDS
from cp_megatron.preflight.rules import misnumbered, multiples, refuse_unused

_UNREAD: Sequence[tuple[Callable[[ModelConfig], bool], tuple[str, ...], str, str]] = (
    (
        lambda model: not model.multi_latent_attention,
        LATENT_WIDTHS,
        "without --multi-latent-attention",
        "--multi-latent-attention with it",
    ),
    (
        lambda model: not model.qk_layernorm or model.multi_latent_attention,
        ("qk_norm_scope",),
        "without norms of heads",
        "--qk-layernorm with it, and no --multi-latent-attention",
    ),
    (
        lambda model: not (model.qk_layernorm and model.multi_latent_attention),
        ("latent_norm_epsilon",),
        "without norms of latents",
        "--multi-latent-attention --qk-layernorm with it",
    ),
    (
        lambda model: not model.has_linear_layers,
        LINEAR_SIZES,
        "without gated DeltaNets",
        "--linear-attention-freq 4 with it",
    ),
    (
        lambda model: not model.has_attention_layers,
        (
            *("num_query_groups", "kv_channels", "v_head_dim", "multi_latent_attention"),
            *("qk_layernorm", "softmax_scale", "softmax_type", "attn_logit_softcapping"),
            *("attention_output_gate", "window_size", "window_layers"),
            *("rotary_base", "rope_type", "rotary_percent", "no_rope_layers"),
            *("add_qkv_bias", "add_attention_output_bias"),
        ),
        "without a layer that attends",
        "fewer gated DeltaNets",
    ),
    (
        lambda model: model.normalization != "LayerNorm",
        ("norm_bias",),
        "with --normalization RMSNorm, which has no bias",
        "--normalization LayerNorm",
    ),
    (
        lambda model: not model.is_gated,
        ("activation_func_clamp_value", "glu_linear_offset"),
        "without a gate in the MLP",
        "--swiglu, --geglu or --quick-geglu with it",
    ),
    (
        lambda model: model.position_embedding_type != "rope",
        ROTARY_FIELDS,
        "without --position-embedding-type rope",
        "--position-embedding-type rope",
    ),
    (
        lambda model: not model.disable_bias_linear,
        ("add_attention_output_bias", "add_mlp_bias"),
        "without --disable-bias-linear, because all linear layers have biases",
        "--disable-bias-linear with it",
    ),
)
"""Flags without an effect: in which models, which flags, the reason, and what works."""


def check_blocks(model: ModelConfig, given: frozenset[str]) -> None:
    """Checks that the variants of the blocks fit one another, and that typed flags have an effect.

    Args:
        model: the flags of the model.
        given: the flags that the user typed, with their dashes.

    Raises:
        ConfigError: they do not; several mistakes are one ``CombinedError``.
    """
    mistakes = Mistakes()
    mistakes_of = _blocks, _latent, _recurrences, _positions
    for error in chain.from_iterable(found(model) for found in mistakes_of):
        with mistakes.collect():
            raise error
    for is_unread, names, reason, works in _UNREAD:
        if is_unread(model):
            with mistakes.collect():
                refuse_unused(model, names, given, reason=reason, works=works)
    mistakes.raise_any()


def _blocks(model: ModelConfig) -> Iterator[ConfigError]:
    """The mistakes about the MLP and the order of the blocks."""
    gates = [name for name in ("swiglu", "geglu", "quick_geglu") if getattr(model, name)]
    for name in gates[1:]:
        first, row = settings()[gates[0]], settings()[name]
        rule = f"contradicts {first.flag}: the gate of the MLP has one function"
        one, other = f"{row.flag} {first.off_flag}", f"{row.off_flag} {first.flag}"
        yield ConfigError(row.flag, "", rule, f"{one}, or {other}")
    if model.parallel_residual and model.norm_placement != "pre":
        rule = "has one norm, before attention and the MLP, which both read it"
        yield ConfigError("--parallel-residual", "", rule, "--norm-placement pre")


def _latent(model: ModelConfig) -> Iterator[ConfigError]:
    """The flags that latent attention does not read or does not support."""
    if not model.multi_latent_attention:
        return
    unread, unable = (
        f"{verb} --multi-latent-attention" for verb in ("has no effect with", "is not supported by")
    )
    groups, heads = model.num_query_groups, model.num_attention_heads
    if groups not in (None, heads):
        rule = f"{unread}: every query head has keys of its own"
        yield ConfigError("--num-query-groups", groups, rule, f"--num-query-groups {heads}")
    if model.kv_channels is not None:
        works = "--kv-channels None with --qk-head-dim, --qk-pos-emb-head-dim and --v-head-dim"
        rule = f"{unread}, whose own flags give the widths of heads"
        yield ConfigError("--kv-channels", model.kv_channels, rule, works)
    if model.rotary_percent != 1.0:
        rule = f"{unread}, where a flag of its own gives the number of rotated channels"
        works = "--qk-pos-emb-head-dim"
        yield ConfigError("--rotary-percent", model.rotary_percent, rule, works)
    if model.softmax_type != "vanilla":
        yield ConfigError("--softmax-type", model.softmax_type, unable, "--softmax-type vanilla")
    if (cap := model.attn_logit_softcapping) is not None:
        yield ConfigError("--attn-logit-softcapping", cap, unable, "no --attn-logit-softcapping")
    if model.attention_output_gate:
        yield ConfigError("--attention-output-gate", "", unable, "no --attention-output-gate")


def _recurrences(model: ModelConfig) -> Iterator[ConfigError]:
    """The mistakes about gated DeltaNets, and about lists of layers that attend."""
    flag, layers = "--linear-attention-layers", model.linear_attention_layers
    if layers is not None:
        shown = " ".join(map(str, layers))
        rule, works = misnumbered(layers, model.num_layers)
        if not layers:
            rule, works = "names no layer", f"no {flag}"
        elif model.linear_attention_freq is not None:
            rule, works = "contradicts --linear-attention-freq", "one of the two"
        if rule:
            yield ConfigError(flag, shown, rule, works)
    if (dropout := model.attention_dropout) and not model.has_attention_layers:
        rule = "has no effect without a layer that attends"
        yield ConfigError("--attention-dropout", dropout, rule, "--attention-dropout 0")
    key_heads, heads = model.linear_num_key_heads, model.linear_num_value_heads
    if model.has_linear_layers and heads % key_heads:
        rule = f"must be a multiple of --linear-num-key-heads {key_heads}"
        yield ConfigError("--linear-num-value-heads", heads, rule, multiples(heads, key_heads))
    for flag, named in (
        ("--window-layers", model.window_layers),
        ("--no-rope-layers", model.no_rope_layers),
    ):
        recurrent = [layer for layer in named or () if model.is_linear(layer)]
        if recurrent:
            rule = f"names layer {recurrent[0]}, which is a gated DeltaNet and does not attend"
            yield ConfigError(flag, " ".join(map(str, named or ())), rule, "layers that attend")


def _positions(model: ModelConfig) -> Iterator[ConfigError]:
    """The mistakes about which layers rotate which channels."""
    if model.position_embedding_type != "rope":
        return
    width, layers = model.rotary_dim, model.no_rope_layers
    if model.multi_latent_attention and width % 2:
        rule = "must be even, because rope rotates pairs of channels"
        yield ConfigError("--qk-pos-emb-head-dim", width, rule, str(width + 1))
    elif model.rotary_percent != 1.0 and (width % 2 or width < 2):
        rule = f"rotates {width} of {model.head_dim} channels of a head, which must be an even"
        share = math.ceil(max(2, width // 2 * 2) / model.head_dim * 1e6) / 1e6
        yield ConfigError(
            "--rotary-percent", model.rotary_percent, f"{rule} number of at least 2", f"{share:g}"
        )
    if layers is not None:
        shown = " ".join(map(str, layers))
        rule, works = misnumbered(layers, model.num_layers)
        if not layers:
            rule, works = "names no layer", "no --no-rope-layers"
        if rule:
            yield ConfigError("--no-rope-layers", shown, rule, works)
    base, has_window = model.window_rotary_base, (model.window_size or (-1, 0))[0] >= 0
    if base is not None and not has_window:
        works = "--window-size LEFT 0 with it"
        yield ConfigError("--window-rotary-base", base, "has no effect without a window", works)
    yield from _temperature(model)


def _temperature(model: ModelConfig) -> Iterator[ConfigError]:
    """The mistakes about the factor of late queries, which is part of the rotation."""
    flag, beta = "--query-temperature-beta", model.query_temperature_beta
    if beta and model.original_length is None:
        works = "--original-max-position-embeddings 8192 with it"
        yield ConfigError(flag, beta, "needs the length L of its formula", works)
    if beta and model.no_rope_layers is not None:
        rule = "belongs to the rotation, which --no-rope-layers removes from some layers"
        yield ConfigError(flag, beta, rule, "one of the two")
