"""A small copy of a transformers config, with which a model of the same code is built in no time.

Numbers of things shrink: layers, heads, experts, tokens of the vocabulary. What decides which code
runs stays: the kinds of layers, the rotary embedding, the width of a head, the ratio of heads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, TypeGuard

VOCABULARY = 128
# Special tokens that lie above the small vocabulary take its last ids, so the first are ordinary.
NUM_ORDINARY_TOKENS = 64
WINDOW = 6  # in tokens; a probe's documents are longer
_MOST_LAYERS = 6
_NUM_EXPERTS = 8
_WIDTH = 64
_INTERMEDIATE_SIZE = 64
_STATE_SIZE = 16  # of Mamba-2; its chunks of tokens need not be longer either

_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"),
)
_HEADS: Mapping[str, Sequence[str]] = {
    "num_attention_heads": ("num_key_value_heads", "num_kv_heads"),
    "swa_num_attention_heads": ("swa_num_key_value_heads",),
    **dict.fromkeys(
        (
            *("n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "num_decoder_attention_heads"),
            "num_encoder_attention_heads",
        ),
        (),
    ),
}
# Heads of recurrent layers: the names of their number, of the number of their keys, and of their
# width in Mamba-2. A name is empty where there is no other number, or no width to change.
_RECURRENT_HEADS: Sequence[tuple[str, str, str]] = (
    ("linear_num_heads", "", ""),
    ("linear_num_value_heads", "linear_num_key_heads", ""),
    ("mamba_n_heads", "mamba_n_groups", "mamba_d_head"),
    ("mamba_num_heads", "n_groups", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_ngroups", "mamba_headdim"),
    ("num_heads", "n_groups", "head_dim"),
)
_EXPANSIONS = ("expand", "mamba_expand")  # of the hidden size to the heads of Mamba-2
_HYBRID_LAYERS = "hybrid_layer_ids"  # the numbers of some layers
_HEAD_WIDTHS = ("head_dim", "qk_nope_head_dim")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim")
_AT_MOST: Mapping[str, int] = {
    r".*vocab_size.*|.*vocab": VOCABULARY,
    r"(num_|n_routed_|num_local_|moe_num_|zero_)experts?(_num)?": _NUM_EXPERTS,
    r"n_group|topk_group|num_expert_group": 1,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts": 2,
    r".*intermediate_size.*|.*ffn_dim|d_ff|dim_ff|dff|n_inner|ffn_hidden_size|feed_forward_size"
    r"|expert_ffn_hidden_size": _INTERMEDIATE_SIZE,
    r"sliding_window(_size)?|attention_window_size|window_size|local_attention": WINDOW,
    r"mamba_d_state|(ssm_)?state_size|(mamba_)?chunk_size": _STATE_SIZE,
    r"first_k_dense_replace|num_dense_layers|max_window_layers": 1,
}


def shrink(config: Any, *, narrow: bool = True) -> Any:
    """A copy of a PreTrainedConfig in which every number of things is small.

    Args:
        config: any config; those inside it shrink too.
        narrow: whether heads and the hidden size shrink as well.
    """
    small = deepcopy(config)
    widths: dict[int, int] = {}
    for part in parts_of(small):
        narrower = (partial(_narrower, widths), _few_recurrent_heads) if narrow else ()
        for fewer in (_fewer_layers, _at_most, *narrower):
            for name, value in fewer(vars(part)).items():
                setattr(part, name, value)
        _lower_special_tokens(part)
    return small


def parts_of(config: Any) -> Iterator[Any]:
    """The config and every config inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from parts_of(value)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _fewer_layers(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Some layers of each kind; lists with an entry per layer follow."""
    counts = {name: sizes[name] for name in _LAYERS if _is_count(sizes.get(name))}
    changes: dict[str, Any] = {name: min(count, 2) for name, count in counts.items()}
    if not counts:
        return {}
    name, num_layers = next(iter(counts.items()))
    lists = {
        key: value
        for key, value in sizes.items()
        if isinstance(value, list | tuple) and len(value) == num_layers
    }
    shared = sizes.get("num_kv_shared_layers", 0)
    chosen = _chosen_layers([[value[i] for value in lists.values()] for i in range(num_layers)])
    for key, value in lists.items():
        changes[key] = type(value)(value[layer] for layer in chosen)
    if _HYBRID_LAYERS in sizes:
        kept = enumerate(chosen)
        changes[_HYBRID_LAYERS] = [i for i, layer in kept if layer in sizes[_HYBRID_LAYERS]]
    changes[name] = len(chosen)
    if shared:
        changes["num_kv_shared_layers"] = len(chosen) if shared == num_layers else 1
    return changes


def _chosen_layers(kinds: Sequence[object]) -> list[int]:
    """The first two layers of each kind, as many as fit."""
    seen: Counter[str] = Counter()
    occurrences = []
    for layer, kind in enumerate(map(repr, kinds)):
        occurrences.append((seen[kind], layer))
        seen[kind] += 1
    return sorted(layer for count, layer in sorted(occurrences)[:_MOST_LAYERS] if count < 2)


def _narrower(widths: dict[int, int], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Two groups of at most four heads; the hidden size follows the heads, or is free of them.

    Args:
        widths: from the hidden sizes of the configs before this one to those of their copies; a
            config without heads follows them, and this function adds its own.
        sizes: the values of this config.
    """
    changes: dict[str, Any] = {}
    shares = [1.0]
    for name, kv_names in _HEADS.items():
        heads = sizes.get(name)
        if not _is_count(heads) or not heads:
            continue
        kv_name = next((kv for kv in kv_names if _is_count(sizes.get(kv))), None)
        groups = sizes[kv_name] if kv_name else heads
        few, ratio = min(groups, 2), heads // max(groups, 1)
        changes[name] = few * (4 if ratio >= 4 else min(ratio, 2))
        if kv_name:
            changes[kv_name] = few
        shares.append(changes[name] / heads)
    head_dim = next((sizes[n] for n in _HEAD_WIDTHS if _is_count(sizes.get(n))), None)
    for name in _WIDTHS:
        width = sizes.get(name)
        if not _is_count(width) or width <= _WIDTH:
            continue
        small = width * min(shares)
        if not changes:
            small = widths.get(width, _WIDTH)
        elif head_dim and width not in {
            sizes[heads] * head_dim for heads in _HEADS.keys() & changes
        }:
            small = _WIDTH
        if small == int(small) and small % 2 == 0:
            widths.setdefault(width, int(small))
            names = [key for key, value in sizes.items() if _same(key, value, width)]
            changes |= dict.fromkeys(names, int(small))
            if sizes.get("attention_hidden_size") == 2 * width:  # of Zamba, with the embedding
                changes["attention_hidden_size"] = 2 * int(small)
    return changes


def _few_recurrent_heads(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """At most two heads of keys and four of values; those of Mamba-2 fill the expanded width."""
    changes: dict[str, Any] = {}
    for name, key_name, width_name in _RECURRENT_HEADS:
        heads, keys = sizes.get(name), sizes.get(key_name or name)
        if not _is_count(heads) or not _is_count(keys):
            continue
        few = changes[key_name or name] = min(keys, 2)
        if not width_name:
            changes[name] = few * min(heads // keys, 2)
            continue
        hidden = next(sizes[x] for x in _WIDTHS if x in sizes)
        width = int(hidden * next(sizes[x] for x in _EXPANSIONS if x in sizes))
        changes |= {name: 2 * few, width_name: width // (2 * few)}
        if _is_count(sizes.get("mamba_d_ssm")):
            changes["mamba_d_ssm"] = width
    return changes


def _same(name: str, value: object, width: int) -> bool:
    """Whether a value is a width equal to the hidden size, and not a number of other things."""
    other = re.search("position|vocab|length|window|token|intermediate|ffn|inner|layers", name)
    return _is_count(value) and value == width and not other


def _at_most(sizes: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for pattern, most in _AT_MOST.items():
        for name, value in sizes.items():
            if not re.fullmatch(pattern, name):
                continue
            if _is_count(value) and value > most:
                changes[name] = most
            elif isinstance(value, list) and all(map(_is_count, value)):
                changes[name] = [min(item, most) for item in value]
    return changes


def _lower_special_tokens(config: Any) -> None:
    names = [name for name in vars(config) if re.search(r"_token_(id|index)$", name)]
    for place, name in enumerate(names):
        value = getattr(config, name)
        if (_is_count(value) and value >= VOCABULARY) or isinstance(value, list):
            setattr(config, name, VOCABULARY - 1 - place)
