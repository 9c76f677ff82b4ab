"""Hugging Face transformers under context parallelism: the engine as one of its attentions.

    huggingface.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="cp_megatron")
    batch = huggingface.shard_batch(group, input_ids=ids, position_ids=positions, labels=labels)
    model(**batch).loss.backward()

The loss is this rank's share: the sum over ranks is the loss of the model on one rank, and the sum
of the parameters' gradients its gradient.

transformers hands keyword arguments it does not know down to every layer's attention and to the
loss, so what the engine needs travels inside the batch: the plan, the labels already shifted, and
how many of them count in all. Everything else of a model must work on each token by itself. Layers
that do not (recurrent ones, say) are refused where a model that has attention names them in its
config; one without any attention, like Mamba, never asks: do not hand it a sharded batch.

The documents of a packed row are those transformers reads from ``position_ids``: one ends where
the next position is not one more. RoPE reads the same positions, each rank its own:

    position_ids   0 1 2 3 | 0 1 | 0 1        two ranks, zigzag: rank 0 holds chunks a and d and
    chunks          a   b     c     d         gets the position_ids 0 1 0 1, rank 1 2 3 0 1

A few old models (OPT, Falcon, ...) mask no documents by ``position_ids`` when they run on one rank
with ``sdpa``; here documents are separate in every model.

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

# Arguments a model gives its attention that change the result, and what to do instead.
_UNHONOURED: Mapping[str, str] = {
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
    "output_router_logits": "the router's loss added by hand: it is no sum over tokens",
}
# Other layers mix tokens themselves and would see one rank's alone.
_LAYER_TYPES = ("full_attention", "sliding_attention")


def register(name: str = "cp_megatron") -> None:
    """Makes the engine an attention implementation of transformers, ``attn_implementation=name``.

    Raises:
        ConfigError: transformers is not installed, or too old.
    """
    library = import_transformers("attn_implementation", name)
    library.AttentionInterface.register(name, attention)
    library.AttentionMaskInterface.register(name, wanted_mask)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What attention needs to know of one batch, the same in every layer.

    Attributes:
        cp: the engine with the documents as its mask; ``cp.gather(logits, 1)`` is the whole row.
        longest: one more than the largest position in the batch.
    """

    cp: ContextParallel
    longest: int
    _by_window: dict[int, ContextParallel] = field(default_factory=dict, repr=False)

    def within(self, window: int | None) -> ContextParallel:
        """The engine for a layer whose tokens see ``window`` keys, themselves included."""
        if window is None or window >= max(self.cp.mask.lengths):
            return self.cp
        if window not in self._by_window:
            mask = Mask.documents(self.cp.mask.lengths, window=(window - 1, 0))
            # The tokens lie where the batch's layout put them, whatever suits the window best.
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
    """This rank's part of a batch, as keyword arguments of the model. No message.

    Rows whose documents differ are joined to one row of B * S tokens, and a row the layout can not
    divide gets one more document at its end whose labels do not count.

    Args:
        group: the ranks that share each row; None is one rank.
        position_ids: [B, S], [1, S] or [S]; None is one document a row. Read on the host, so best
            kept there until here.
        labels: [B, S], not shifted, -100 where a token does not count. As in transformers, a
            document's first label is its predecessor's target unless it is -100.
        attention_mask: [B, S] of ones; a packed row needs no padding.
        num_items_in_batch: what the sum of token losses is divided by. By default the labels of
            this batch that count; with several batches a step or data parallelism, those of all.
        layout, exchange, kernel, route, hierarchical_sizes, deterministic, check_ranks: the
            options of ``ContextParallel``.
        tokens: ``input_ids`` [B, S] or ``inputs_embeds`` [B, S, ...], and whatever else the model
            takes for each token; all of them are sharded.

    Returns:
        the tokens, ``position_ids``, ``labels`` and ``shift_labels`` [B, S / N] (shifted, the same
        tensor twice), ``num_items_in_batch``, ``use_cache`` and ``context_parallel``, a BatchPlan.

    Raises:
        ConfigError: shapes do not fit, a token is masked as padding, or the engine's own.
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
    mask = _mask([*lengths[0], padding] if padding else lengths[0])
    cp = ContextParallel(
        group,
        mask,
        layout,
        exchange,
        kernel,
        route,
        hierarchical_sizes,
        deterministic=deterministic,
        check_ranks=check_ranks,
    )
    batch: dict[str, Any] = {
        name: cp.shard(_pad(name, x, padding), 1) for name, x in tokens.items()
    }
    if labels is not None:
        counted = (tokens["labels"] != IGNORED_LABEL).sum().clamp(min=1)
        batch["shift_labels"] = batch["labels"]
        batch["num_items_in_batch"] = counted if num_items_in_batch is None else num_items_in_batch
    longest = int(positions.max()) + 1
    return {**batch, "use_cache": False, "context_parallel": BatchPlan(cp=cp, longest=longest)}


def _check_rows(tokens: Mapping[str, Tensor], **others: Tensor | None) -> Tensor:
    """The tensor that says how many rows and tokens there are, once all others agree with it."""
    if ("input_ids" in tokens) == ("inputs_embeds" in tokens):
        raise ConfigError("shard_batch", "", "needs input_ids or inputs_embeds, one of them")
    rows = tokens["input_ids"] if "input_ids" in tokens else tokens["inputs_embeds"]
    for name, x in {**tokens, **others}.items():
        if x is None and name in others:
            continue
        if not isinstance(x, Tensor):
            rule = "must be a tensor with an entry for each token"
            raise ConfigError(name, x, rule, "handing it to the model beside the batch")
        if x.ndim < 2 or x.shape[:2] != rows.shape[:2]:
            rule = f"must have the tokens' shape {tuple(rows.shape[:2])} first"
            raise ConfigError(name, tuple(x.shape), rule)
    padding_mask = others["attention_mask"]
    if padding_mask is not None:
        _refuse_padding(padding_mask)
    return rows


def _documents(
    position_ids: Tensor | None, num_rows: int, seq_len: int
) -> tuple[Tensor, list[list[int]]]:
    """int64 [B, S] on the host and each row's document lengths: a step other than +1 ends one."""
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


def _mask(lengths: list[int]) -> Mask:
    return Mask.documents(lengths) if len(lengths) > 1 else Mask.causal(lengths[0])


def _pad(name: str, x: Tensor, padding: int) -> Tensor:
    """``padding`` more tokens at the end of dim 1: a document of token 0 that no loss counts."""
    if not padding:
        return x
    shape = (x.shape[0], padding, *x.shape[2:])
    if name == "position_ids":
        return torch.cat([x, torch.arange(padding, device=x.device).expand(shape)], 1)
    return torch.cat([x, x.new_full(shape, IGNORED_LABEL if name == "labels" else 0)], 1)


@dataclass(frozen=True)
class WantedMask:
    """What transformers hands its layers in a mask's place: the window a layer's mask has."""

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
    """The registered mask function: no mask is made, but one it could not honour is refused.

    Raises:
        ConfigError: padding, a mask with conditions of its own, layers that mix tokens outside
            attention, or keys from a cache.
    """
    if attention_mask is not None:
        _refuse_padding(attention_mask)
    # transformers asks for vmap where a model adds conditions, and names an added alternative.
    alternatives = getattr(mask_function, "__qualname__", "").startswith("or_masks")
    if use_vmap or alternatives:
        rule = "the model adds conditions of its own to the causal mask"
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
    """The registered attention function: this rank's queries over the keys of all ranks.

    Args:
        module: the layer's attention; its config tells the rotary embedding.
        query: [B, H, S / N, D].
        key: [B, G, S / N, D].
        value: [B, G, S / N, E].
        attention_mask: what ``wanted_mask`` returned, or None.
        scaling: of the scores, by default D ** -0.5.
        dropout: must be 0.
        sliding_window: keys a query sees, itself included.
        is_causal: overrules the module's own; must be true.
        context_parallel: from ``shard_batch``.
        kwargs: whatever else the model was called with.

    Returns:
        [B, S / N, H, E] and None for the probabilities, which are never whole.

    Raises:
        ConfigError: the call asks for something the engine does not do, or shapes do not fit.
    """
    if context_parallel is None:
        works = "model(**shard_batch(group, ...)), with a model that hands keywords to attention"
        raise ConfigError("context_parallel", None, "is missing from the call", works)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or "CrossAttention" in type(module).__name__:
        rule = "must be causal attention of a sequence over itself"
        raise ConfigError("attention", type(module).__name__, rule)
    if isinstance(attention_mask, Tensor):
        rule = "can not be honoured: which key a query sees is planned from position_ids"
        raise ConfigError("attention_mask", tuple(attention_mask.shape), rule, "no attention_mask")
    if query.shape[2] != key.shape[2]:
        _refuse_cache(query.shape[2], key.shape[2])
    if dropout:
        raise ConfigError("attention_dropout", dropout, "must be 0 in training", "0.0")
    _refuse_unhonoured(getattr(module, "config", None), kwargs)
    _refuse_changing_rope(getattr(module, "config", None), context_parallel)
    cp = context_parallel.within(_window(attention_mask, sliding_window))
    # [B, H, S, D] -> [B, S, H, D]
    q, k, v = (rearrange(x, "b h s d -> b s h d").contiguous() for x in (query, key, value))
    return cp.attention(q, k, v, scaling), None


def _window(wanted: WantedMask | None, sliding_window: int | None) -> int | None:
    """The mask's window where transformers made one: some models do not repeat it to attention."""
    if wanted is None or sliding_window == wanted.window:
        return sliding_window
    if sliding_window is not None:
        rule = f"differs from the mask's {wanted.window}"
        raise ConfigError("sliding_window", sliding_window, rule, "the same in mask and attention")
    return wanted.window


def _refuse_padding(attention_mask: Tensor) -> None:
    if not bool(attention_mask.all()):
        rule = "padding can not be masked"
        works = "rows without padding; documents packed in a row, told apart by position_ids"
        raise ConfigError("attention_mask", "with zeros", rule, works)


def _refuse_cache(num_queries: int, num_keys: int) -> None:
    rule = f"{num_queries} queries over {num_keys} keys: only a sequence over itself is planned"
    raise ConfigError("past_key_values", "", rule, "use_cache=False, one call per batch")


def _refuse_other_mixers(config: Any) -> None:
    layers = set(getattr(config, "layer_types", None) or ())
    if not layers and any(name.startswith("mamba_") for name in vars(config or object)):
        layers = {"mamba"}  # transformers 5.0 names no layer types in its hybrid models
    if not layers <= set(_LAYER_TYPES):
        wrong = ", ".join(sorted(layers.difference(_LAYER_TYPES)))
        rule = "layers of this type see only one rank's tokens"
        raise ConfigError("layer_types", wrong, rule, ", ".join(_LAYER_TYPES))


def _refuse_unhonoured(config: Any, kwargs: Mapping[str, Any]) -> None:
    for name, works in _UNHONOURED.items():
        value = kwargs.get(name)
        if name.startswith("output_"):
            value = value or getattr(config, name, None)
        if value is not None and value is not False:
            shown = tuple(value.shape) if isinstance(value, Tensor) else value
            rule = "can not be honoured under context parallelism"
            raise ConfigError(name, shown, rule, works)


def _refuse_changing_rope(config: Any, plan: BatchPlan) -> None:
    """Frequencies chosen by the largest position a rank sees would differ from rank to rank."""
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
            rule = f"changes with the length of what a rank holds beyond position {limit}"
            works = f"documents of at most {limit} tokens, or another rope_type"
            raise ConfigError("rope_type", kind, rule, works)
