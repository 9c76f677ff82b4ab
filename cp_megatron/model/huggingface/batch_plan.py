"""A rank's part of a batch for a transformers model, and what its attention layers need to know.

Shapes: B batch, S tokens of the whole row, N ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask
from cp_megatron.plan.layout import sequence_divisor

IGNORED_LABEL = -100  # transformers' ignore_index, of every loss that reads shift_labels


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
        refuse_padding(padding_mask)
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


def refuse_padding(attention_mask: Tensor) -> None:
    if not bool(attention_mask.all()):
        rule = "masks padding, which is not supported"
        works = "rows without padding, or packed documents with position_ids"
        raise ConfigError("attention_mask", "with zeros", rule, works)
