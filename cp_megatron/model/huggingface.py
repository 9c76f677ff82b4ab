"""Hugging Face transformers under context parallelism: an attention implementation for it.

    huggingface.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="cp_megatron")
    batch = huggingface.shard_batch(group, input_ids=ids, position_ids=positions, labels=labels)
    model(**batch).loss.backward()

The loss is this rank's share: the sum over ranks is the loss of the model on one rank, and the sum
of the parameters' gradients is its gradient.

transformers passes unknown keyword arguments on to every layer's attention and to the loss, so the
batch carries what the engine needs: the mask and layout, the shifted labels, and how many of them
count. Every other part of a model must compute each token by itself. A model with attention whose
config names other layers (recurrent ones) is refused. A model without any attention, like Mamba,
never calls this module: do not give it a sharded batch.

transformers reads the documents of a packed row from ``position_ids``: a document ends where the
next position is not one more. RoPE reads the same positions, each rank its own:

    position_ids   0 1 2 3 | 0 1 | 0 1        two ranks, zigzag: rank 0 holds chunks a and d and
    chunks          a   b     c     d         gets the position_ids 0 1 0 1, rank 1 2 3 0 1

A few old models (OPT, Falcon, ...) do not mask documents by ``position_ids`` when they run on one
rank with ``sdpa``; here documents are separate in every model.

Shapes: B batch, S tokens of the whole row, N ranks, H query heads, G key/value heads, D head dim,
E value head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.model.transformers_library import import_transformers
from cp_megatron.plan import Mask
from cp_megatron.plan.layout import sequence_divisor

IGNORED_LABEL = -100  # transformers' ignore_index, of every loss that reads shift_labels

# Arguments of attention that would change the result, and what to use instead.
_UNSUPPORTED: Mapping[str, str] = {
    "softcap": "a config without attn_logit_softcapping",
    "s_aux": "a model without attention sinks",
    "sinks": "a model without attention sinks",
    "head_mask": "no head_mask",
    "position_bias": "a model with rotary or absolute positions",
    "indices": "a model without sparse attention",
    "block_indices": "a model without sparse attention",
    "cu_seq_lens_q": "documents given by position_ids",
    "cu_seq_lens_k": "documents given by position_ids",
    "cache": "training, without a cache",
    "output_attentions": "attn_implementation='eager' on one rank",
    "output_router_logits": "the router's loss added by hand, because it is not a sum over tokens",
}
# Layers of other types mix tokens themselves and would see only those of one rank.
_LAYER_TYPES = ("full_attention", "sliding_attention")


def register(name: str = "cp_megatron") -> None:
    """Registers the engine in transformers, as ``attn_implementation=name``.

    Raises:
        ConfigError: transformers is not installed or too old.
    """
    library = import_transformers("attn_implementation", name)
    library.AttentionInterface.register(name, attention)
    library.AttentionMaskInterface.register(name, wanted_mask)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The context of a batch that every attention layer needs; the same in every layer.

    Attributes:
        cp: the engine with the documents as its mask; ``cp.gather(logits, 1)`` returns whole rows.
        longest: the largest position in the batch, plus one.
    """

    cp: ContextParallel
    longest: int
    _by_window: dict[int, ContextParallel] = field(default_factory=dict, repr=False)

    def within(self, window: int | None) -> ContextParallel:
        """The engine for a layer whose queries see ``window`` keys, including their own."""
        if window is None or window >= max(self.cp.mask.lengths):
            return self.cp
        if window not in self._by_window:
            mask = Mask.documents(self.cp.mask.lengths, window=(window - 1, 0))
            # The tokens have been placed by the layout of the batch.
            self._by_window[window] = self.cp.with_mask(mask, self.cp.layout)
        return self._by_window[window]


def shard_batch(
    group: dist.ProcessGroup | None,
    *,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    layout: str = "auto",
    exchange: str = "auto",
    kernel: str = "auto",
    route: str = "auto",
    hierarchical_sizes: tuple[int, int] | None = None,
    deterministic: bool = False,
    check_ranks: bool = True,
    **tokens: Tensor,
) -> dict[str, Any]:
    """This rank's part of a batch, as keyword arguments of the model. It sends no message.

    Rows whose documents differ are joined to one row of B * S tokens. A row that the layout cannot
    divide is extended by a document whose labels do not count.

    Args:
        group: the ranks that share each row; None is one rank.
        position_ids: [B, S], [1, S] or [S]; None is one document per row. They are read on the
            host, so keep them there until this call.
        labels: [B, S], not shifted; -100 marks a token that does not count. As in transformers, the
            first label of a document is the target of the token before, unless it is -100.
        attention_mask: [B, S] of ones; a packed row needs no padding.
        num_items_in_batch: the divisor of the sum of losses, by default the number of labels in
            this batch that count. With several batches per step or data parallelism it must be
            given: the number in all of them.
        layout, exchange, kernel, route, hierarchical_sizes, deterministic, check_ranks: the
            options of ``ContextParallel``.
        tokens: ``input_ids`` [B, S] or ``inputs_embeds`` [B, S, ...], and any other argument of the
            model that has an entry per token; all of them are sharded.

    Returns:
        ``tokens``, ``position_ids``, ``labels`` and ``shift_labels`` [B, S / N] (shifted, the same
        tensor twice), ``num_items_in_batch``, ``use_cache`` and ``context_parallel``, a BatchPlan.

    Raises:
        ConfigError: shapes do not fit, a token is masked as padding, or the engine raised it.
    """
    rows = _check_rows(tokens, labels=labels, attention_mask=attention_mask)
    positions, lengths = _documents(position_ids, *rows.shape[:2])
    if labels is not None:
        tokens["labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    tokens["position_ids"] = positions.to(rows.device)
    if any(row != lengths[0] for row in lengths):
        # [B, S, ...] -> [1, B * S, ...]
        tokens = {name: rearrange(x, "b s ... -> 1 (b s) ...") for name, x in tokens.items()}
        lengths = [[length for row in lengths for length in row]]
    cp_size = dist.get_world_size(group) if group is not None else 1
    padding = -sum(lengths[0]) % sequence_divisor("zigzag" if layout == "auto" else layout, cp_size)
    documents = [*lengths[0], padding] if padding else lengths[0]
    mask = Mask.documents(documents) if len(documents) > 1 else Mask.causal(documents[0])
    options = layout, exchange, kernel, route, hierarchical_sizes
    cp = ContextParallel(
        group, mask, *options, deterministic=deterministic, check_ranks=check_ranks
    )
    batch: dict[str, Any] = {k: cp.shard(_pad(k, x, padding), 1) for k, x in tokens.items()}
    if labels is not None:
        counted = (tokens["labels"] != IGNORED_LABEL).sum().clamp(min=1)
        batch["shift_labels"] = batch["labels"]
        batch["num_items_in_batch"] = counted if num_items_in_batch is None else num_items_in_batch
    longest = int(positions.max()) + 1
    return {**batch, "use_cache": False, "context_parallel": BatchPlan(cp=cp, longest=longest)}


def _check_rows(tokens: Mapping[str, Tensor], **others: Tensor | None) -> Tensor:
    """Checks that all tensors have the same rows and tokens, and returns ids or embeddings."""
    if ("input_ids" in tokens) == ("inputs_embeds" in tokens):
        raise ConfigError("shard_batch", "", "needs either input_ids or inputs_embeds")
    rows = tokens["input_ids"] if "input_ids" in tokens else tokens["inputs_embeds"]
    for name, x in {**tokens, **others}.items():
        if x is None and name in others:
            continue
        if not isinstance(x, Tensor):
            rule = "must be a tensor with an entry for each token"
            raise ConfigError(name, x, rule, "pass it to the model directly")
        if x.ndim < 2 or x.shape[:2] != rows.shape[:2]:
            rule = f"must begin with the shape of the tokens, {tuple(rows.shape[:2])}"
            raise ConfigError(name, tuple(x.shape), rule)
    padding_mask = others["attention_mask"]
    if padding_mask is not None:
        _refuse_padding(padding_mask)
    return rows


def _documents(
    position_ids: Tensor | None, num_rows: int, seq_len: int
) -> tuple[Tensor, list[list[int]]]:
    """int64 positions [B, S] on the host, and the lengths of the documents of each row."""
    if position_ids is None:
        position_ids = torch.arange(seq_len)
    fits = position_ids.ndim in (1, 2) and position_ids.shape[-1] == seq_len
    if not fits or (position_ids.ndim == 2 and position_ids.shape[0] not in (1, num_rows)):
        rule = f"must be [{num_rows}, {seq_len}], [1, {seq_len}] or [{seq_len}]"
        raise ConfigError("position_ids", tuple(position_ids.shape), rule)
    positions = position_ids.detach().cpu().expand(num_rows, seq_len)
    lengths = []
    for row in positions.numpy():
        starts = np.flatnonzero(np.diff(row) != 1) + 1
        lengths.append(np.diff([0, *starts, seq_len]).tolist())
    return positions, lengths


def _pad(name: str, x: Tensor, padding: int) -> Tensor:
    """Appends ``padding`` tokens along dim 1: a document of zeros whose labels do not count."""
    if not padding:
        return x
    shape = (x.shape[0], padding, *x.shape[2:])
    if name == "position_ids":
        return torch.cat([x, torch.arange(padding, device=x.device).expand(shape)], 1)
    return torch.cat([x, x.new_full(shape, IGNORED_LABEL if name == "labels" else 0)], 1)


@dataclass(frozen=True)
class WantedMask:
    """Takes the place of a mask in transformers, and carries the window that it would have."""

    window: int | None


def wanted_mask(
    *args: Any,
    q_length: int | None = None,
    kv_length: int | None = None,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> WantedMask:
    """The registered mask function. It builds no mask, and refuses masks that are not supported.

    Raises:
        ConfigError: padding, a mask with further conditions, layers that mix tokens outside of
            attention, or keys from a cache.
    """
    if attention_mask is not None:
        _refuse_padding(attention_mask)
    # transformers uses vmap or or_masks if a model adds conditions to the mask.
    alternatives = getattr(mask_function, "__qualname__", "").startswith("or_masks")
    if use_vmap or alternatives:
        rule = "the model adds conditions to the causal mask"
        raise ConfigError("attention_mask", "", rule, "a model with causal or sliding attention")
    if q_length is not None and kv_length is not None and q_length != kv_length:
        _refuse_cache(q_length, kv_length)
    _refuse_other_mixers(config)
    return WantedMask(local_size)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: WantedMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    context_parallel: BatchPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: the queries of this rank attend the keys of all ranks.

    Args:
        module: the attention of the layer; its config describes the rotary embedding.
        query: [B, H, S / N, D].
        key: [B, G, S / N, D].
        value: [B, G, S / N, E].
        attention_mask: what ``wanted_mask`` returned, or None.
        scaling: multiplies the scores, by default D ** -0.5.
        dropout: must be 0.
        sliding_window: number of keys that a query sees, including its own.
        is_causal: overrides the attribute of the module; must be true.
        context_parallel: made by ``shard_batch``.
        kwargs: all other arguments of the model.

    Returns:
        [B, S / N, H, E], and None for the probabilities, which never exist as a whole.

    Raises:
        ConfigError: the call needs something that is not supported, or shapes do not fit.
    """
    if context_parallel is None:
        works = "model(**shard_batch(group, ...)), with a model that passes keywords to attention"
        raise ConfigError("context_parallel", None, "is missing from the call", works)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or "CrossAttention" in type(module).__name__:
        rule = "must be causal self-attention"
        raise ConfigError("attention", type(module).__name__, rule)
    if isinstance(attention_mask, Tensor):
        rule = "is not supported: position_ids decide which keys a query sees"
        raise ConfigError("attention_mask", tuple(attention_mask.shape), rule, "no attention_mask")
    if query.shape[2] != key.shape[2]:
        _refuse_cache(query.shape[2], key.shape[2])
    if dropout:
        raise ConfigError("attention_dropout", dropout, "must be 0 in training", "0.0")
    _refuse_unsupported(getattr(module, "config", None), kwargs)
    _refuse_changing_rope(getattr(module, "config", None), context_parallel)
    cp = context_parallel.within(_window(attention_mask, sliding_window))
    # [B, H, S, D] -> [B, S, H, D]
    q, k, v = (rearrange(x, "b h s d -> b s h d").contiguous() for x in (query, key, value))
    return cp.attention(q, k, v, scaling), None


def _window(wanted: WantedMask | None, sliding_window: int | None) -> int | None:
    """The window. Some models give it to the mask alone, and not to attention."""
    if wanted is None or sliding_window == wanted.window:
        return sliding_window
    if sliding_window is not None:
        rule = f"differs from {wanted.window}, the window of the mask"
        raise ConfigError("sliding_window", sliding_window, rule, "the same in mask and attention")
    return wanted.window


def _refuse_padding(attention_mask: Tensor) -> None:
    if not bool(attention_mask.all()):
        rule = "masks padding, which is not supported"
        works = "rows without padding, or packed documents with position_ids"
        raise ConfigError("attention_mask", "with zeros", rule, works)


def _refuse_cache(num_queries: int, num_keys: int) -> None:
    rule = f"gives {num_queries} queries {num_keys} keys, but only self-attention is supported"
    raise ConfigError("past_key_values", "", rule, "use_cache=False, one call per batch")


def _refuse_other_mixers(config: Any) -> None:
    layers = set(getattr(config, "layer_types", None) or ())
    if not layers and any(name.startswith("mamba_") for name in vars(config or object)):
        layers = {"mamba"}  # transformers 5.0 names no layer types in its hybrid models
    if not layers <= set(_LAYER_TYPES):
        wrong = ", ".join(sorted(layers.difference(_LAYER_TYPES)))
        rule = "layers of this type would see the tokens of one rank only"
        raise ConfigError("layer_types", wrong, rule, ", ".join(_LAYER_TYPES))


def _refuse_unsupported(config: Any, kwargs: Mapping[str, Any]) -> None:
    for name, works in _UNSUPPORTED.items():
        value = kwargs.get(name)
        if name.startswith("output_"):
            value = value or getattr(config, name, None)
        if value is not None and value is not False:
            shown = tuple(value.shape) if isinstance(value, Tensor) else value
            rule = "is not supported under context parallelism"
            raise ConfigError(name, shown, rule, works)


def _refuse_changing_rope(config: Any, plan: BatchPlan) -> None:
    """Refuses frequencies that depend on the largest position, which differs between ranks."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [x for x in parameters.values() if isinstance(x, Mapping)] or [parameters]
    for rope in nested if plan.cp.cp_size > 1 else ():
        kind = rope.get("rope_type")
        limit = None
        if kind == "dynamic":
            limit = getattr(config, "max_position_embeddings", None)
        elif kind == "longrope":
            limit = rope.get("original_max_position_embeddings")
        if limit is not None and plan.longest > limit:
            rule = f"would differ between ranks beyond position {limit}"
            works = f"documents of at most {limit} tokens, or another rope_type"
            raise ConfigError("rope_type", kind, rule, works)
