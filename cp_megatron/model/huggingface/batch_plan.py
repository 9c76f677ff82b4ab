"""A rank's part of a batch for a transformers model, and what its attention layers need to know.

Shapes: B batch, S tokens of the whole row, N ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cp_megatron.comm.row_digest import digest_rows
from cp_megatron.context_parallel import ContextParallel, Received
from cp_megatron.errors import ConfigError
from cp_megatron.model.huggingface.recomputed_layer import RecomputedLayer
from cp_megatron.model.huggingface.row_documents import BOUNDARIES, LONGEST, read_documents
from cp_megatron.model.huggingface.unseen_models import refuse_unseen_models
from cp_megatron.plan import Mask
from cp_megatron.plan.layout import sequence_divisor

IGNORED_LABEL = -100  # transformers' ignore_index, of every loss that reads shift_labels


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The context of a batch that every attention layer needs; the same in every layer.

    Attributes:
        cp: the engine with the documents as its mask; ``cp.gather(logits, 1)`` returns whole rows,
            joined and padded as the engine has them; ``whole`` returns them as they were given.
        longest: the largest position in the batch, plus one.
        num_rows: B, also where the rows are joined to one.
        padding: tokens that were appended so that the layout divides the row.
        outputs_whole: the model returns what it would return for whole rows.
        recomputed: of the layer that is called, if it is recomputed in backward.
    """

    cp: ContextParallel
    longest: int
    num_rows: int = 1
    padding: int = 0
    outputs_whole: bool = False
    recomputed: RecomputedLayer | None = None

    def __post_init__(self) -> None:
        refuse_unseen_models(BatchPlan)

    def within(self, window: int | None) -> ContextParallel:
        """The engine for a layer whose queries see ``window`` keys, including their own."""
        if window is None or window >= max(self.cp.mask.lengths):
            return self.cp
        return self.cp.within((window - 1, 0))

    def received(self) -> Received | None:
        """What the next operation of this layer received or will receive, if it is recomputed."""
        return None if self.recomputed is None else self.recomputed.next()

    def whole(self, x: Tensor) -> Tensor:
        """Returns the rows as they were given to ``shard_batch``, on every rank.

        Args:
            x: what a model computes from its part of the batch, with an entry for each token:
                [B, S / N, ...], or [1, B * S / N, ...] if the rows are joined.

        Returns:
            [B, S, ...]. The gradient is summed over ranks; each keeps its part.
        """
        rows = self.cp.gather(x, 1)
        rows = rows[:, : rows.shape[1] - self.padding]
        if rows.shape[0] == self.num_rows:
            return rows
        return rearrange(rows, "1 (b s) ... -> b s ...", b=self.num_rows)


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
    check_ranks: str | bool = True,
    **tokens: Any,
) -> dict[str, Any]:
    """This rank's part of a batch, as keyword arguments of the model. It sends no message.

    Every rank of the group must be given the same rows: the first attention compares a digest of
    them, and raises an error on every rank if they differ.

    Rows whose documents differ are joined to one row of B * S tokens. A row that the layout cannot
    divide is extended by a document whose labels do not count.

    Args:
        group: the ranks that share each row; None is one rank.
        position_ids: [B, S], [1, S] or [S], or [3 or 4, B, S] with equal entries; None counts from
            0 in each document. What says where documents are is read on the host, so keep it there
            until this call.
        labels: [B, S], not shifted; -100 marks a token that does not count. As in transformers, the
            first label of a document is the target of the token before, unless it is -100.
        attention_mask: [B, S]: ones, 0 for padding, or a number for each document. Padding becomes
            documents of their own: their labels do not count, nor do they predict any. Such labels
            must be -100 if ``num_items_in_batch`` is given.
        num_items_in_batch: the divisor of the sum of losses, by default the number of labels in
            this batch that count. With several batches per step or data parallelism it must be
            given: the number in all of them.
        layout, exchange, kernel, route, hierarchical_sizes, deterministic, check_ranks: the
            options of ``ContextParallel``.
        tokens: ``input_ids`` [B, S] or ``inputs_embeds`` [B, S, ...], and any other argument of the
            model that has an entry per token; all of them are sharded. ``seq_idx``,
            ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` of collators
            say where documents are, and are left out of the result.

    Returns:
        ``tokens``, ``position_ids``, ``labels`` and ``shift_labels`` [B, S / N] (shifted, the same
        tensor twice), ``num_items_in_batch``, ``use_cache`` and ``context_parallel``, a BatchPlan.

    Raises:
        ConfigError: shapes do not fit, the arguments contradict each other about documents, or the
            engine raised it.
    """
    stated = {name: tokens.pop(name, None) for name in (*BOUNDARIES, *LONGEST)}
    rows = _check_rows(tokens, labels)
    found = read_documents(rows.shape[:2], position_ids, attention_mask, stated)
    if labels is not None:
        shifted = tokens["labels"] = _shift(labels, found.padding)
        if found.padding is not None and num_items_in_batch is not None:
            _refuse_lost_labels(labels, shifted)
    tokens["position_ids"] = found.positions.to(rows.device)
    whole, lengths = _join(tokens, found.lengths)
    cp_size = dist.get_world_size(group) if group is not None else 1
    padding = -sum(lengths) % sequence_divisor("zigzag" if layout == "auto" else layout, cp_size)
    mask, options = _mask(lengths, padding), (layout, exchange, kernel, route, hierarchical_sizes)
    compared = cp_size > 1 and check_ranks not in (False, "never")
    digest = _digest(whole, num_items_in_batch) if compared else None
    cp = ContextParallel(
        group, mask, *options, deterministic=deterministic, check_ranks=check_ranks, rows=digest
    )
    batch: dict[str, Any] = {k: cp.shard(_pad(k, x, padding), 1) for k, x in whole.items()}
    if labels is not None:
        if num_items_in_batch is None:
            num_items_in_batch = (whole["labels"] != IGNORED_LABEL).sum().clamp(min=1)
        batch |= {"shift_labels": batch["labels"], "num_items_in_batch": num_items_in_batch}
    plan = BatchPlan(cp=cp, longest=found.longest, num_rows=len(rows), padding=padding)
    return {**batch, "use_cache": False, "context_parallel": plan}


def _join(
    tokens: Mapping[str, Tensor], lengths: list[list[int]]
) -> tuple[Mapping[str, Tensor], list[int]]:
    """Tokens and the lengths of their documents; as one row if the rows have different ones."""
    if all(row == lengths[0] for row in lengths):
        return tokens, lengths[0]
    # [B, S, ...] -> [1, B * S, ...]
    joined = {name: rearrange(x, "b s ... -> 1 (b s) ...") for name, x in tokens.items()}
    return joined, [length for row in lengths for length in row]


def _check_rows(tokens: Mapping[str, Any], labels: Tensor | None) -> Tensor:
    """Checks that all tensors have the same rows and tokens, and returns ids or embeddings."""
    if ("input_ids" in tokens) == ("inputs_embeds" in tokens):
        raise ConfigError("shard_batch", "", "needs either input_ids or inputs_embeds")
    rows: Tensor = tokens["input_ids"] if "input_ids" in tokens else tokens["inputs_embeds"]
    if rows.numel() == 0:
        raise ConfigError("tokens", tuple(rows.shape), "must be at least one token of one row")
    for name, x in {**tokens, "labels": rows if labels is None else labels}.items():
        if not isinstance(x, Tensor):
            rule = "must be a tensor with an entry for each token"
            raise ConfigError(name, x, rule, "pass it to the model directly")
        if x.ndim < 2 or x.shape[:2] != rows.shape[:2]:
            rule = f"must begin with the shape of the tokens, {tuple(rows.shape[:2])}"
            raise ConfigError(name, tuple(x.shape), rule)
    return rows


def _shift(labels: Tensor, padding: Tensor | None) -> Tensor:
    """[B, S]: each token gets the label of the next one. Padding has no label and gets none."""
    if padding is not None:
        labels = labels.masked_fill(padding.to(labels.device), IGNORED_LABEL)
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    if padding is not None:
        shifted = shifted.masked_fill(padding.to(labels.device), IGNORED_LABEL)
    return shifted


def _refuse_lost_labels(labels: Tensor, shifted: Tensor) -> None:
    """Refuses labels that padding takes away, since a given divisor of the loss counts them."""
    lost = int((labels[:, 1:] != IGNORED_LABEL).sum() - (shifted != IGNORED_LABEL).sum())
    if lost:
        rule = "belong to padding or to the token after it, but num_items_in_batch counts them"
        works = f"{IGNORED_LABEL} there; or padding on the right, labelled {IGNORED_LABEL}"
        raise ConfigError("labels", f"{lost} of them", rule, works)


def _digest(tokens: Mapping[str, Tensor], num_items_in_batch: int | Tensor | None) -> Tensor:
    divisor = torch.as_tensor(-1 if num_items_in_batch is None else num_items_in_batch)
    return digest_rows({**tokens, "num_items_in_batch": divisor.double()})


def _mask(lengths: list[int], padding: int) -> Mask:
    documents = [*lengths, padding] if padding else lengths
    return Mask.documents(documents) if len(documents) > 1 else Mask.causal(documents[0])


def _pad(name: str, x: Tensor, padding: int) -> Tensor:
    """Appends ``padding`` tokens along dim 1: a document of zeros whose labels do not count."""
    if not padding:
        return x
    shape = (x.shape[0], padding, *x.shape[2:])
    if name == "position_ids":
        return torch.cat([x, torch.arange(padding, device=x.device).expand(shape)], 1)
    return torch.cat([x, x.new_full(shape, IGNORED_LABEL if name == "labels" else 0)], 1)


def refuse_padding(attention_mask: Tensor) -> None:
    """Refuses a mask that reaches the model, where nothing would obey it."""
    if not bool((attention_mask == 1).all()):
        rule = "masks padding or numbers documents, which the model itself cannot read"
        works = "shard_batch(group, attention_mask=...), which reads it and leaves it out"
        held = "with zeros" if not bool(attention_mask.all()) else "with numbers"
        raise ConfigError("attention_mask", held, rule, works)
