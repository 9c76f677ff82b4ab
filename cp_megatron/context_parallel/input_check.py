"""Checks that inputs fit the layout, and that all ranks compute the same attention.

Ranks that disagree on the mask, a shape or a type would wait for messages that never come, or sum
unrelated numbers. Ranks that brought different rows would compute rows that are half of each. So
before attention every rank sends one small message: digests of its call and of the rows that its
part was cut from, and whether its inputs are valid. All ranks see all digests, so all of them raise
together.

Shapes: B = batch, S = tokens of this rank, H = query heads, G = key/value heads, D = head dim,
E = value head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.nonblocking import start_all_gather
from cp_megatron.comm.rng import hash_text
from cp_megatron.context_parallel.attention_function import KeptAttention
from cp_megatron.context_parallel.received import Received
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, SequenceLayout

MODES = ("auto", "always", "once", "never")


def check_mode(mode: str | bool) -> str:
    """Returns one of ``MODES``, or refuses the mode. True stands for auto, False for never."""
    if isinstance(mode, bool):
        return "auto" if mode else "never"
    if mode not in MODES:
        raise ConfigError("check_ranks", mode, "is not a mode of the check", ", ".join(MODES))
    return mode


def check_shapes(q: Tensor, k: Tensor, v: Tensor, num_tokens: int, seq_len: int) -> None:
    """Refuses q, k and v that do not fit each other or the layout.

    Args:
        q, k, v: the inputs of attention, [B, S, H, D], [B, S, G, D] and [B, S, G, E].
        num_tokens: the tokens that this rank holds.
        seq_len: the tokens of the whole row.

    Raises:
        ConfigError: a shape, type, device or stride that attention cannot take.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ConfigError("attention", shapes, "must be [batch, tokens, heads, head_dim]")
    if not q.shape[:2] == k.shape[:2] == v.shape[:2] or k.shape[2] != v.shape[2]:
        raise ConfigError("attention", shapes, "must agree in batch, tokens and kv heads")
    if q.shape[1] != num_tokens:
        rule = f"tokens must be this rank's {num_tokens} of {seq_len}"
        raise ConfigError("attention", shapes, rule)
    if 0 in (*q.shape, *v.shape):
        raise ConfigError("attention", shapes, "must not be empty")
    if q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        rule = "query heads must be a multiple of kv heads, and q and k equally wide"
        raise ConfigError("attention", shapes, rule)
    if not q.dtype == k.dtype == v.dtype:
        value = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        works = "torch.autocast, or q.to(v.dtype) and k.to(v.dtype)"
        raise ConfigError("attention", value, "must be one type", works)
    if not q.device == k.device == v.device:
        value = f"{q.device}, {k.device}, {v.device}"
        raise ConfigError("attention", value, "must be on one device")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_contiguous():
            value = f"{name} with strides {x.stride()}"
            raise ConfigError("attention", value, "must be contiguous", f"{name}.contiguous()")


def check_options(
    q: Tensor, scale: float | None, sinks: Tensor | None = None, softcap: float | None = None
) -> float:
    """Returns the factor of the scores, or refuses options that do not fit the queries.

    Args:
        q: [B, S, H, D].
        scale: the factor; None stands for D ** -0.5.
        sinks: floating [H], on the device of q.
        softcap: the bound of the scores.

    Raises:
        ConfigError: scale or softcap is not positive and finite, or the sinks have another shape,
            type or device.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    for name, value in (("scale", scale), ("softcap", softcap)):
        # Fused kernels mask scores with -inf before they scale them.
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(name, value, "must be positive and finite")
    if sinks is None:
        return scale
    heads = q.shape[2]
    if sinks.shape != (heads,) or not sinks.is_floating_point():
        given = f"{tuple(sinks.shape)}, {sinks.dtype}"
        raise ConfigError("sinks", given, f"must be one real number for each of {heads} heads")
    if sinks.device != q.device:
        raise ConfigError("sinks", f"on {sinks.device}", f"must be on {q.device}, as q is")
    return scale


class RankAgreement:
    """Compares the calls of one ``ContextParallel`` with those of the other ranks.

    Args:
        mode: one of ``MODES``; see ``check_ranks`` of ``ContextParallel``.
        group: the ranks that must agree; None is one rank.
        mask, layout: must agree in every call; an error names the mask.
        plan: the other options of the object, which must agree as well.
    """

    def __init__(
        self,
        mode: str,
        group: dist.ProcessGroup | None,
        mask: Mask,
        layout: SequenceLayout,
        plan: tuple[object, ...],
    ) -> None:
        self.mode, self._group = mode, group
        self._mask, self._layout, self._plan = mask, layout, (layout.kind, *plan)
        self._seen: set[object] = set()
        self.continues = False  # the caller compares the masks

    def continue_from(self, other: RankAgreement) -> None:
        """Shares what mode ``once`` has seen with the agreement of another mask."""
        self._seen, self.continues = other._seen, True

    @contextmanager
    def after_checks(
        self,
        tensors: Sequence[Tensor],
        options: tuple[object, ...],
        dropout: object,
        rows: Tensor | None,
        kept: KeptAttention | Received | None,
    ) -> Iterator[None]:
        """Compares with the other ranks, if the mode requires it, after this rank's own checks.

        The checks are the body of the ``with`` statement. Whatever they raise, the other ranks
        learn of it first.

        Args:
            tensors: the inputs of attention.
            options: the other arguments of the call. In mode ``once``, a call with shapes, a type
                or options that are new is compared.
            dropout: compared with the rest, but mode ``once`` does not notice that it is new.
            rows: as in ``agree``.
            kept: if it is filled, the call sends nothing and is not compared.

        Raises:
            Exception: what the checks raise.
            ConfigError: as ``agree``.
        """
        problem = None
        try:
            yield
        except Exception as error:  # the other ranks must learn of any error
            problem = error
        kind = (*(tuple(x.shape) for x in tensors), str(tensors[0].dtype), *options)
        device, mode = tensors[0].device, self.mode
        if device.type != "cuda":
            device = torch.device("cpu")
        if mode == "auto":
            mode = "once" if device.type == "cuda" else "always"
        # In mode once, ranks without a problem may skip the comparison: do not wait for them.
        seen = self._seen if mode == "once" and problem else kind in self._seen
        alone = mode == "never" or (mode == "once" and seen) or (kept is not None and kept.filled)
        mask, layout = self._digests
        call = (kind, self._plan, dropout, layout)
        group = None if alone else self._group
        agree(group, mask=mask, call=call, rows=rows, problem=problem, device=device)
        self._seen.add(kind)

    @cached_property
    def _digests(self) -> tuple[str, int]:
        """Represents mask and layout in the comparison; the first names the mask in an error."""
        mask = self._mask
        name = f"{mask.kind} of {mask.seq_len} tokens, window {mask.window}, #{digest(mask):x}"
        return name, digest(self._layout.chunks)


def agree(
    group: dist.ProcessGroup | None,
    *,
    mask: object,
    call: object,
    rows: Tensor | None,
    problem: Exception | None,
    device: torch.device,
) -> None:
    """Returns on every rank, or raises on every rank.

    Args:
        group: the ranks that must agree; None is one rank.
        mask, call: describe the mask and the rest of the call; compared by their ``repr``.
        rows: int64 [], a digest of the whole rows; None if the caller does not know them.
        problem: the error that this rank found in its own inputs.
        device: the device of the group's messages.

    Raises:
        Exception: ``problem`` itself.
        ConfigError: another rank has a problem, or rows, mask or call differ between ranks.
    """
    if group is not None and dist.get_world_size(group) > 1:
        facts = [digest(mask), digest(call), int(problem is not None), 0]
        mine = torch.tensor(facts, dtype=torch.int64, device=device)
        if rows is not None:
            mine[3].copy_(rows)  # on the device: the host has not waited for it
        told = start_all_gather(mine.unsqueeze(0), group).wait().tolist()
        if problem is None:
            _compare(told, dist.get_rank(group), mask, call)
    if problem is not None:
        raise problem


def _compare(told: Sequence[Sequence[int]], rank: int, mask: object, call: object) -> None:
    refusing = [number for number, facts in enumerate(told) if facts[2]]
    if refusing:
        rule = f"is refused by rank {_list(refusing)} of the group, whose error gives the reason"
        raise ConfigError("attention", f"on rank {rank}", rule)
    # Other rows often have other documents and lengths, so they are reported first.
    for column, name, value in ((3, "rows", None), (0, "mask", mask), (1, "attention", call)):
        mine = told[rank][column]
        others = [number for number, facts in enumerate(told) if facts[column] != mine]
        if others and name == "rows":
            rule = f"differ from what rank {_list(others)} of the group has: every rank of a "
            rule += "context parallel group must get the same rows, labels and divisor of the loss"
            works = "a dataloader that deals rows to groups, see README's examples for trainers"
            raise ConfigError(name, "", rule, works)
        if others:
            rule = f"differs from what rank {_list(others)} of the group has"
            text = str(value)
            shown = text if len(text) <= 120 else f"{text[:120]}..."
            raise ConfigError(name, shown, rule, "the same on every rank")


def digest(value: object) -> int:
    """Returns 63 bits, the same on every machine and version of Python."""
    return hash_text(repr(value))


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
