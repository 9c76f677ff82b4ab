"""The rules of a model's blocks: which variants of norms, heads, MLPs and positions go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cp_megatron.config import ModelConfig
from cp_megatron.errors import ConfigError, Mistakes
from cp_megatron.preflight.rules import refuse_unused

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")


_ROTARY = (
    *("window_rotary_base", "rotary_percent", "rotary_interleaved", "no_rope_layers"),
    "query_temperature_beta",
)


class _Unused(NamedTuple):
    """Settings that have no effect if ``here``, the reason, and what works."""

    here: bool
    names: tuple[str, ...]
    reason: str
    works: str


class _Rule(NamedTuple):
    """A combination that is refused: flag, value, rule and what works."""

    broken: bool
    flag: str
    value: object
    rule: str
    works: str


def check_blocks(model: ModelConfig, given: frozenset[str]) -> None:
    """The variants of the blocks fit one another, and each flag that is typed has an effect.

    Raises:
        ConfigError: otherwise; several mistakes are one ``CombinedError``.
    """
    mistakes = Mistakes()
    for row in (*_blocks(model), *_latent(model), *_positions(model)):
        with mistakes.collect():
            if row.broken:
                raise ConfigError(*row[1:])
    for unused in _unused(model):
        if unused.here:
            with mistakes.collect():
                refuse_unused(model, unused.names, given, reason=unused.reason, works=unused.works)
    mistakes.raise_any()


def _unused(model: ModelConfig) -> Iterator[_Unused]:
    """The flags that this model may not read."""
    yield _Unused(
        not model.multi_latent_attention,
        _LATENT,
        "without --multi-latent-attention",
        "--multi-latent-attention with it",
    )
    yield _Unused(
        not model.qk_layernorm or model.multi_latent_attention,
        ("qk_norm_scope",),
        "without norms of heads",
        "--qk-layernorm with it",
    )
    yield _Unused(
        not (model.qk_layernorm and model.multi_latent_attention),
        ("latent_norm_epsilon",),
        "without norms of latents",
        "--multi-latent-attention --qk-layernorm with it",
    )
    yield _Unused(
        model.normalization != "LayerNorm",
        ("norm_bias",),
        "with --normalization RMSNorm, which has no bias",
        "--normalization LayerNorm",
    )
    yield _Unused(
        model.position_embedding_type != "rope",
        _ROTARY,
        f"with --position-embedding-type {model.position_embedding_type}",
        "--position-embedding-type rope",
    )
    yield _Unused(
        not model.disable_bias_linear,
        ("add_attention_output_bias", "add_mlp_bias"),
        "without --disable-bias-linear, because all linear layers have biases",
        "--disable-bias-linear with it",
    )


def _blocks(model: ModelConfig) -> Iterator[_Rule]:
    """The norms, the MLP and the order of the blocks."""
    yield _Rule(
        model.swiglu and model.geglu,
        *("--geglu", "", "contradicts --swiglu: the gate of the MLP has one function"),
        "one of the two",
    )
    yield _Rule(
        model.parallel_residual and model.norm_placement != "pre",
        *("--parallel-residual", "", "has one norm, before both blocks"),
        "--norm-placement pre",
    )


def _latent(model: ModelConfig) -> Iterator[_Rule]:
    """Latent attention and what it does not have."""
    latent = model.multi_latent_attention
    groups, heads = model.num_query_groups, model.num_attention_heads
    reason = "has no effect with --multi-latent-attention"
    yield _Rule(
        latent and groups is not None and groups != heads,
        *("--num-query-groups", groups, f"{reason}: every query head has keys of its own"),
        f"{heads}, or leave it out",
    )
    yield _Rule(
        latent and model.kv_channels is not None,
        *("--kv-channels", model.kv_channels, f"{reason}, which has the widths of its own flags"),
        "--qk-head-dim, --qk-pos-emb-head-dim and --v-head-dim",
    )
    yield _Rule(
        latent and model.rotary_percent != 1.0,
        *("--rotary-percent", model.rotary_percent, f"{reason}, which rotates channels apart"),
        "--qk-head-dim and --qk-pos-emb-head-dim",
    )
    yield _Rule(
        latent and model.softmax_type != "vanilla",
        *("--softmax-type", model.softmax_type, "is not supported by --multi-latent-attention"),
        "--softmax-type vanilla",
    )
    yield _Rule(
        latent and model.attn_logit_softcapping is not None,
        *("--attn-logit-softcapping", model.attn_logit_softcapping),
        *("is not supported by --multi-latent-attention", "no --attn-logit-softcapping"),
    )


def _positions(model: ModelConfig) -> Iterator[_Rule]:
    """Which layers rotate which channels."""
    if model.position_embedding_type != "rope":
        return
    width, last = model.rotary_dim, model.num_layers - 1
    rule = f"rotates {width} of {model.head_dim} channels of a head, which must be an even number"
    yield _Rule(
        model.rotary_percent != 1.0 and (width % 2 == 1 or width < 2),
        *("--rotary-percent", model.rotary_percent, f"{rule} of at least 2"),
        f"{max(2, width // 2 * 2) / model.head_dim:g}",
    )
    yield _Rule(
        model.multi_latent_attention and width % 2 == 1,
        *("--qk-pos-emb-head-dim", width, "must be even, because rope rotates pairs of channels"),
        str(width + 1),
    )
    layers = model.no_rope_layers
    shown = " ".join(map(str, layers or ()))
    yield _Rule(
        layers is not None and not (layers and all(0 <= layer <= last for layer in layers)),
        *("--no-rope-layers", shown, f"must be numbers from 0 to {last}, at least one"),
        f"0 to {last}",
    )
    yield _Rule(
        layers is not None and len(set(layers)) < len(layers),
        *("--no-rope-layers", shown, "names a layer twice"),
        " ".join(map(str, sorted(set(layers or ())))),
    )
    yield _Rule(
        model.window_rotary_base is not None and model.window_size is None,
        *("--window-rotary-base", model.window_rotary_base, "has no effect without a window"),
        "--window-size LEFT 0 with it",
    )
    yield from _temperature(model)


def _temperature(model: ModelConfig) -> Iterator[_Rule]:
    """The factor of late queries, which is part of the rotation."""
    yield _Rule(
        bool(model.query_temperature_beta) and model.original_length is None,
        *("--query-temperature-beta", model.query_temperature_beta),
        *("needs the length L of its formula", "--original-max-position-embeddings 8192 with it"),
    )
    yield _Rule(
        bool(model.query_temperature_beta) and model.no_rope_layers is not None,
        *("--query-temperature-beta", model.query_temperature_beta),
        *(
            "belongs to the rotation, which --no-rope-layers removes from some layers",
            "one of the two",
        ),
    )
