"""Finds the tensors of a Hugging Face model in a checkpoint of another program, by their names.

This module does not import torch.

Two sets of names are known: those of transformers (``model.layers.0.self_attn.q_proj.weight``) and
those of Meta's llama and torchtitan (``layers.0.attention.wq.weight``). All names may have a prefix
such as ``model.`` or ``app.model.``; what wrappers add to names is left out.

Meta's llama rotates neighbouring channels, transformers channel i with i + d/2, so the rows of each
head of q and k come in another order (d = 8, row numbers of the folder to write). torchtitan's
Qwen3 rotates as transformers does.

    in the checkpoint   0 4 1 5 2 6 3 7      [d/2, 2]
    in the folder       0 1 2 3 4 5 6 7      [2, d/2]
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cp_megatron.config.files.foreign_folders import FROM_TORCH
from cp_megatron.errors import ConfigError
from cp_megatron.families.family import HFTensor
from cp_megatron.families.registry import HFModel

TensorType = tuple[str, tuple[int, ...]]
"""Dtype (``float32``) and shape."""

_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|qkv_linear)\."
)
# Tables that follow from the configuration, which old versions stored.
_TABLES = re.compile(r"(.*\.)?(rope\.freqs|freqs_cis|rope_cache|rotary_emb\.inv_freq)")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_META: Mapping[str, str] = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_META_FAMILIES: Mapping[str, bool] = {"llama": True, "mistral": True, "qwen3": False}
"""The families that have Meta's names, and whether neighbouring channels are rotated there."""
_ROTATED = re.compile(r".*\.self_attn\.[qk]_proj\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class ForeignTensors:
    """Where the tensors of a folder are in a checkpoint.

    Attributes:
        names: the name in the checkpoint of each tensor of the folder.
        interleaved: tensors whose rows are in Meta's order.
        head: the name of an output layer that must equal the embedding, with which it is tied.
        left_out: what of the checkpoint is not the model's, by the first part of its name.
    """

    names: Mapping[str, str]
    interleaved: frozenset[str]
    head: str | None
    left_out: tuple[str, ...]


def find_tensors(
    source: object,
    target: HFModel,
    wanted: Collection[HFTensor],
    stored: Mapping[str, TensorType],
    others: Collection[str],
) -> ForeignTensors:
    """Matches the tensors of a checkpoint with those of a folder to write.

    Args:
        source: the checkpoint, for errors.
        target: the model of the config.json, which the checkpoint must be.
        wanted: the tensors of a Hugging Face folder of this model.
        stored: the tensors of the checkpoint by name.
        others: the names of what else it holds.

    Raises:
        ConfigError: a tensor is missing, superfluous or has another shape.
    """
    plain = {_WRAPPERS.sub("", name): name for name in (*stored, *others)}
    if len(plain) < len(stored) + len(others):
        raise ConfigError(FROM_TORCH, source, "two of its tensors have the same name")
    prefix, is_meta = _prefix(source, target, plain)
    spelled = {
        x.key: prefix + (_meta_name(x.key, prefix, plain) if is_meta else x.key) for x in wanted
    }
    for tensor in wanted:
        name = spelled[tensor.key]
        _check(source, target, tensor, name, stored.get(plain.get(name, "")))
    head = prefix + (_meta_name(_HEAD, prefix, plain) if is_meta else _HEAD)
    if _HEAD in spelled or head not in plain:
        head = ""
    used = {*spelled.values(), head}
    rest = [name for name in plain if name not in used and not _TABLES.fullmatch(name)]
    tops = {_group(name, prefix) for name in spelled.values()}
    for name in rest:
        if name.startswith(prefix) and _group(name, prefix) in tops:
            rule = f"holds {name}, for which {target.family.architecture} has no place"
            raise ConfigError(FROM_TORCH, source, rule, "the config.json of this very model")
    interleaved = is_meta and _META_FAMILIES[target.family.model_type]
    outer = prefix[: prefix.find(".") + 1]
    return ForeignTensors(
        names={key: plain[name] for key, name in spelled.items()},
        interleaved=frozenset(key for key in spelled if interleaved and _ROTATED.fullmatch(key)),
        head=plain[head] if head else None,
        left_out=tuple(sorted({_group(name, outer) for name in rest})),
    )


def _group(name: str, prefix: str) -> str:
    """The prefix, if the name begins with it, and the next part of the name."""
    start = prefix if name.startswith(prefix) else ""
    return start + name[len(start) :].split(".")[0]


def _prefix(source: object, target: HFModel, names: Collection[str]) -> tuple[str, bool]:
    """What stands before the names of the model, and whether they are Meta's."""
    places = []
    for is_meta, anchor in ((False, _EMBEDDING), (True, _meta(_EMBEDDING))):
        for name in names:
            before = name.removesuffix(anchor)
            if before != name and (not before or before.endswith(".")):
                places.append((before, is_meta))
    if len(places) != 1:
        names_known = f"{_EMBEDDING} (transformers) nor {_meta(_EMBEDDING)} (torchtitan and Meta)"
        rule = f"holds neither {names_known}, so no model of known names is in it"
        if places:
            shown = ", ".join(f"{before}*" for before, _ in places[:4])
            rule = f"holds {len(places)} models ({shown})"
        raise ConfigError(FROM_TORCH, source, rule, "a checkpoint of one causal language model")
    if places[0][1] and target.family.model_type not in _META_FAMILIES:
        rule = f"has Meta's names, which no {target.family.architecture} has"
        works = f"--load-hf with a config.json of {', '.join(_META_FAMILIES)}"
        raise ConfigError(FROM_TORCH, source, rule, works)
    return places[0]


def _meta(key: str) -> str:
    """Meta's name of a tensor of transformers."""
    module, _, leaf = key.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module)
    return f"layers.{layer[1]}.{_META[layer[2]]}.{leaf}" if layer else f"{_META[module]}.{leaf}"


def _meta_name(key: str, prefix: str, names: Collection[str]) -> str:
    """Meta's name; newer versions of torchtitan call the output layer as transformers does."""
    return key if key == _HEAD and prefix + key in names else _meta(key)


def _check(
    source: object, target: HFModel, tensor: HFTensor, name: str, stored: TensorType | None
) -> None:
    works = "the config.json of this very model"
    if stored is None:
        rule = (
            f"lacks {name}, which {target.family.architecture} has by {target.folder}/config.json"
        )
        raise ConfigError(FROM_TORCH, source, rule, works)
    dtype, shape = stored
    if shape != tensor.shape:
        rule = f"{name} has the shape {list(shape)}, but by {target.folder}/config.json it is "
        raise ConfigError(FROM_TORCH, source, f"{rule}{list(tensor.shape)}", works)
    if "float" not in dtype:
        raise ConfigError(FROM_TORCH, source, f"{name} has the dtype {dtype}", "float weights")
