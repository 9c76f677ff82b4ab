"""``ContextParallel``: the whole engine as one object.

Shapes: B = batch, S = tokens of the whole row, N = ranks, H = query heads, G = key/value heads,
D = head dim, E = value head dim; for latent attention L = width of a latent, R = width of a rotary
key, P = width of the other part of a key, D = P + R.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.context_parallel.attention_function import KeptAttention, planned_attention
from cp_megatron.context_parallel.autocast import cast_inputs
from cp_megatron.context_parallel.input_check import (
    RankAgreement,
    check_mode,
    check_options,
    check_shapes,
)
from cp_megatron.context_parallel.kernel_chooser import KernelChooser
from cp_megatron.context_parallel.latent_expansion import check_latent_shapes, expand_heads
from cp_megatron.context_parallel.latent_function import planned_latent_attention
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.context_parallel.recurrent_sequence import RecurrentSequence
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.plan import Mask, Rates, Schedule, SequenceLayout
from cp_megatron.plan.exchange import check_exchange, check_latent_exchange
from cp_megatron.plan.mask import Window
from cp_megatron.plan.rates import USUAL_RATES


class ContextParallel(RecurrentSequence):
    """Attention over sequences that a group of ranks shares, under one mask.

    Construction sends no message and allocates nothing on the device, so a new mask for every batch
    is cheap. ``prepare`` computes this rank's plan ahead of time and may run in another thread. The
    objective is the *sum* of the ranks' losses: gradients of parameters must be summed over the
    group, and a loss that every rank computes alike from ``gather`` must be divided by its size.

    Args:
        group: the ranks that share each sequence, in order; None is one rank without messages.
        mask: the mask of every row of the batch.
        layout: ``contiguous``, ``zigzag``, ``balanced`` or ``auto`` (balanced for documents,
            otherwise zigzag if the mask is causal); or a layout of the same length.
        exchange: ``p2p``, ``all_gather``, ``a2a``, ``a2a+p2p`` or ``auto`` (the one that the
            ranks wait for least, see ``plan/exchange.py``).
        kernel: a kernel's name, or ``auto``; ``kernels/linear_select.py`` for ``linear_attention``.
        route: for p2p, ``ring`` (from the neighbour), ``direct`` (from the owner) or ``auto`` (the
            one that moves fewer keys).
        hierarchical_sizes: (A, P) of a2a+p2p: A neighbours exchange heads, P groups run a ring.
            With ``auto``, the number of ranks that share a node, and the number of nodes.
        exchange_latent: what ``latent_attention`` sends unless its call says otherwise:
            ``latent``, ``expanded`` or ``auto``, as explained there.
        message_parts: the number of parts, at most the key/value heads of a rank, in which p2p and
            a2a+p2p send a message, so that the first ones are computed while others are under way.
            None sends several if computing would not hide the messages. Each part makes calls of
            the kernel smaller.
        rates: how fast network and computing are, for what ``auto`` and None choose. They are not
            measured: state those of a network that is slower, such as one between hosts of CPUs.
        deterministic: the same inputs give the same bits; a kernel that cannot do this is refused.
        check_ranks: compare masks, layouts, shapes and types between the ranks before attention,
            so that a mistake is an error on every rank instead of a hang or a wrong number. Each
            comparison costs one small message. ``always``: before each attention; ``once``: before
            the first of each object and shape, which misses a rank that goes wrong later;
            ``never``; ``auto``: always, but once on CUDA, where waiting for the answer would stall
            the device. True and False stand for ``auto`` and ``never``.
        rows: int64 [], the digest of the batch's rows (``comm/row_digest.py``), which are then
            compared as well. It belongs to this batch: ``within`` keeps it, ``with_mask`` does not.

    Attributes:
        group, mask, layout: as given, or as chosen.
        rank, cp_size: this rank's number in the group, and the size of the group.
        buffers: the memory of messages, shared with the results of ``with_mask`` and ``within``:
            ``buffers.held_bytes`` now, ``buffers.peak_bytes`` at most.
        link_sums: checksums of each link while they are open; shared likewise.
        kernels: chooses the kernel of each attention; shared likewise.

    Raises:
        ConfigError: the layout does not divide the sequence, a name is unknown, the product of the
            sizes is not the number of ranks, or the exchange cannot send latents as asked.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        mask: Mask,
        layout: str | SequenceLayout = "auto",
        exchange: str = "auto",
        kernel: str = "auto",
        route: str = "auto",
        hierarchical_sizes: tuple[int, int] | None = None,
        *,
        exchange_latent: str = "auto",
        message_parts: int | None = None,
        rates: Rates = USUAL_RATES,
        deterministic: bool = False,
        check_ranks: str | bool = "auto",
        rows: Tensor | None = None,
    ) -> None:
        super().__init__(group, mask, layout, rows)
        # A list is accepted, but what is part of a cache key must not change.
        sizes = hierarchical_sizes and cast("tuple[int, int]", tuple(hierarchical_sizes))
        check_exchange(exchange, route, self.cp_size, sizes)
        check_latent_exchange(exchange, exchange_latent)
        self._layout_kind, self._exchange, self._route = layout, exchange, route
        self._sizes, self._exchange_latent, self._parts = sizes, exchange_latent, message_parts
        self._rates = rates
        options = exchange, route, sizes, exchange_latent, message_parts, rates
        self._agreement = RankAgreement(check_mode(check_ranks), group, mask, self.layout, options)
        self._chooser = mask
        self._repeats = len(mask.lengths) == 1  # other batches will have the same tiles
        self.kernels = KernelChooser(kernel, deterministic=deterministic)
        self._by_window: dict[Window, ContextParallel] = {}
        self._plans: dict[tuple[object, ...], RankPlan] = {}

    def with_mask(
        self, mask: Mask, layout: SequenceLayout | None = None, *, compared: bool = False
    ) -> ContextParallel:
        """Returns an object for another mask, with the same ranks, options and buffers.

        Args:
            mask: the mask.
            layout: keeps tokens where this layout has them, as layers with different masks of one
                model need. By default the layout is chosen for the mask, unless this object was
                constructed with a layout.
            compared: the caller compares the masks between the ranks. With ``check_ranks`` once,
                an attention that was compared for one such object is not for the next.
        """
        other = ContextParallel(
            self.group,
            mask,
            layout or self._layout_kind,
            self._exchange,
            route=self._route,
            hierarchical_sizes=self._sizes,
            exchange_latent=self._exchange_latent,
            message_parts=self._parts,
            rates=self._rates,
            check_ranks=self._agreement.mode,
        )
        other.buffers, other.link_sums, other.kernels = self.buffers, self.link_sums, self.kernels
        other._repeats = self._repeats and mask.lengths == self.mask.lengths
        if compared:
            other._agreement.continue_from(self._agreement)
        return other

    def within(self, window: Window | None) -> ContextParallel:
        """Returns an object with another window and the same layout, for layers with that window.

        It is made once and kept. It uses the exchange and the route of this object's own mask, so
        that a batch has one of each.

        Args:
            window: (left, right) as in ``Mask``. If the mask has it already, returns this object.
        """
        mask = self.mask.within(window)
        if mask.window == self.mask.window:
            return self
        if mask.window not in self._by_window:
            other = self.with_mask(mask, self.layout, compared=self._agreement.continues)
            other._chooser, other._rows = self._chooser, self._rows
            self._by_window[mask.window] = other
        return self._by_window[mask.window]

    def schedule(
        self,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int = 1,
        v_head_dim: int | None = None,
        latent: tuple[int, int] | None = None,
        exchange_latent: str = "auto",
    ) -> Schedule:
        """Plans all ranks for heads of this number and width.

        ``latent`` and ``exchange_latent`` are those of ``Schedule.build``.

        Raises:
            ConfigError: the exchange cannot share the heads, or cannot send latents.
        """
        if latent is not None and exchange_latent == "auto":
            exchange_latent = self._exchange_latent
        chosen = Schedule.build(
            *(self._chooser, self.layout, self._exchange, self._route),
            *(num_heads, num_kv_heads, self._sizes),
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            latent=latent,
            exchange_latent=exchange_latent,
            message_parts=self._parts,
            rates=self._rates,
        )
        return chosen.within(self.mask)

    def prepare(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        latent: tuple[int, int] | None = None,
        exchange_latent: str = "auto",
    ) -> None:
        """Computes this rank's plan for such heads, so that attention finds it ready.

        The arguments are those of ``schedule``; with ``latent``, it prepares ``latent_attention``.
        It sends no message and may run in another thread while another mask is in use.

        Raises:
            ConfigError: the exchange cannot share the heads, or cannot send latents.
        """
        heads = num_heads, num_kv_heads, head_dim, v_head_dim or head_dim
        self._plan(heads, latent, exchange_latent)

    @torch.compiler.disable
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        *,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        dropout: Dropout | None = None,
        kept: KeptAttention | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes attention of this rank's queries over the keys of all ranks.

        It is opaque to torch.compile, which must not trace a plan that changes with every mask.

        Args:
            q: [B, S / N, H, D].
            k: [B, S / N, G, D]; H is a multiple of G, query head h reads key head h // (H / G).
            v: [B, S / N, G, E].
            scale: the positive factor of the scores; by default D ** -0.5.
            sinks: floating [H], one more score per head (``sinks.py``): it takes a share of the
                softmax's weights and has no value; -inf stands for no sink. Its gradient is this
                rank's share, to be summed over the group as that of any parameter.
            softcap: the scores become softcap * tanh(score / softcap), as in Gemma 2
                (arXiv:2408.00118); by default they stay as they are.
            dropout: drops attention weights. Its mask depends only on the pair of positions, so it
                is the same under any layout, exchange and number of ranks.
            kept: passed twice, for recomputation: the first call computes and stores its results
                there, the second takes them and sends nothing.
            return_lse: return the logarithm of the softmax's denominator as well. It can be
                differentiated; a gradient of it makes backward about twice as expensive.

        Returns:
            [B, S / N, H, E] in q's type, or autocast's under ``torch.autocast``. With
            ``return_lse``, that and the lse, [B, H, S / N], float32 (float64 for float64), a
            natural logarithm that includes the sink.

        Raises:
            ConfigError: shapes or types do not fit each other, the layout or the kernel.
        """
        q, k, v = cast_inputs(q, k, v)
        options = scale, softcap, sinks is not None and tuple(sinks.shape), return_lse
        with self._agreement.after_checks((q, k, v), options, dropout, self._rows, kept):
            check_shapes(q, k, v, self.layout.shard_len, self.mask.seq_len)
            scale = check_options(q, scale, sinks, softcap)
            kernel = self.kernels.load(q, v.shape[3], dropout, softcap=softcap, **self._tile_kinds)
            plan = self._plan((q.shape[2], k.shape[2], q.shape[3], v.shape[3]))
        return planned_attention(
            *(plan, kernel, q, k, v, scale, dropout, kept), sinks=sinks, returns_lse=return_lse
        )

    @torch.compiler.disable
    def latent_attention(
        self,
        q: Tensor,
        latent: Tensor,
        rotary_key: Tensor,
        weight: Tensor,
        scale: float | None = None,
        *,
        dropout: Dropout | None = None,
        kept: KeptAttention | None = None,
        exchange_latent: str = "auto",
    ) -> Tensor:
        """Computes attention over keys and values that are expanded from a latent.

        Key head h is (weight's first P rows of head h @ latent, rotary_key), and value head h is
        weight's other E rows of head h @ latent, as in DeepSeek-V2 (arXiv:2405.04434).

        Args:
            q: [B, S / N, H, P + R].
            latent: [B, S / N, L], normalized.
            rotary_key: [B, S / N, R], rotated; shared by all heads.
            weight: [H * (P + E), L], for the heads of ``q``.
            scale, dropout, kept: as in ``attention``; D is P + R.
            exchange_latent: ``latent`` sends latents and rotary keys, and expands them where they
                are read, a second time in backward, so that no expanded heads are kept;
                ``expanded`` sends keys and values; ``auto`` does what this object was made with
                or, if that is ``auto`` as well, sends what has fewer bytes.

        Returns:
            [B, S / N, H, E] in the type that ``attention`` returns. The gradients of q, latent and
            rotary_key are complete on this rank; that of ``weight`` is this rank's share, to be
            summed over the group as that of any parameter.

        Raises:
            ConfigError: shapes or types do not fit each other, the layout or the kernel, or the
                exchange cannot send latents.
        """
        q, latent, rotary_key, weight = cast_inputs(q, latent, rotary_key, weight)
        inputs = q, latent, rotary_key, weight
        options = scale, exchange_latent
        with self._agreement.after_checks(inputs, options, dropout, self._rows, kept):
            rows = self.layout.shard_len, self.mask.seq_len
            heads, plain_dim, value_dim = check_latent_shapes(*inputs, *rows)
            scale = check_options(q, scale)
            kernel = self.kernels.load(q, value_dim, dropout, **self._tile_kinds)
            latents = (latent.shape[2], rotary_key.shape[2]), exchange_latent
            plan = self._plan((heads, heads, q.shape[3], value_dim), *latents)
        if plan.sends_latents:
            return planned_latent_attention(plan, kernel, *inputs, scale, dropout, kept)
        k, v = expand_heads(latent, rotary_key, weight, heads, plain_dim)
        return cast(Tensor, planned_attention(plan, kernel, q, k, v, scale, dropout, kept))

    @property
    def _tile_kinds(self) -> dict[str, bool]:
        """What the choice of a kernel asks about the mask."""
        return {"window": self.mask.has_window, "repeats": self._repeats}

    def _plan(
        self,
        heads: tuple[int, int, int, int],
        latent: tuple[int, int] | None = None,
        exchange_latent: str = "auto",
    ) -> RankPlan:
        """This rank's plan for a number of query and key/value heads and their widths."""
        key = heads, latent, exchange_latent
        if key not in self._plans:
            schedule = self.schedule(*heads, latent, exchange_latent)
            if latent is not None and schedule.latent is None:
                self._plans[key] = self._plan(heads)  # the one that ``attention`` runs
            else:
                shared = self.group, self.buffers, self.link_sums
                self._plans[key] = RankPlan(schedule, self.rank, *shared)
        return self._plans[key]
