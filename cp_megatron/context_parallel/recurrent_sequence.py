"""Layers that carry a state along a sequence that a group of ranks shares.

Shapes: B = batch, S = tokens of the whole row, N = ranks, G = key heads, H = value heads, D = key
dim, E = value dim, c channels, W width of a convolution.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.context_parallel.attention_function import KeptAttention
from cp_megatron.context_parallel.autocast import cast_inputs
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.context_parallel.input_check import RankAgreement, check_options
from cp_megatron.context_parallel.kernel_chooser import KernelChooser
from cp_megatron.context_parallel.linear_check import check_convolution, check_linear
from cp_megatron.context_parallel.linear_function import LinearPlan, planned_linear_attention
from cp_megatron.context_parallel.received import Received
from cp_megatron.context_parallel.sharded_sequence import ShardedSequence
from cp_megatron.context_parallel.short_convolution import HaloExchange, short_convolution
from cp_megatron.kernels.linear_interface import LinearInputs
from cp_megatron.plan import Mask, SequenceLayout


class RecurrentSequence(ShardedSequence):
    """Linear recurrences and short convolutions over a sharded sequence.

    Args:
        group, mask, layout: as in ``ShardedSequence``.
        rows: as in ``ContextParallel``.
    """

    buffers: Buffers
    link_sums: LinkSums
    kernels: KernelChooser
    _agreement: RankAgreement

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        mask: Mask,
        layout: str | SequenceLayout,
        rows: Tensor | None,
    ) -> None:
        super().__init__(group, mask, layout)
        self._rows = rows
        self.buffers, self.link_sums = Buffers(), LinkSums()
        self._linear_plans: dict[int, LinearPlan] = {}
        self._halos: dict[int, HaloExchange] = {}

    def prepare_recurrence(self, num_heads: int, conv_width: int) -> None:
        """Computes this rank's plans of a recurrence and of a convolution ahead of time.

        It sends no message and may run in another thread while another mask is in use.

        Args:
            num_heads: the number of value heads, H.
            conv_width: the tokens that the convolution reads, W.

        Raises:
            ConfigError: the mask is not causal or has a window.
        """
        self._linear_plan(num_heads)
        self._halo(conv_width)

    @torch.compiler.disable
    def linear_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None = None,
        *,
        scale: float | None = None,
        kept: KeptAttention | Received | None = None,
    ) -> Tensor:
        """Computes a recurrence whose state crosses ranks: gated DeltaNet, KDA, GLA, Mamba-2's SSD.

        Per head, S_t = e^(g_t) S_(t-1) + k_t u_t^T and out_t = scale S_t^T q_t, from S = 0 at the
        start of every document, with u_t = beta_t (v_t - (e^(g_t) S_(t-1))^T k_t), or v_t without
        ``beta`` (``kernels/linear_reference.py``). Only states travel (``plan/states.py``).

        Args:
            q, k: [B, S / N, G, D], normalized or not, as the layer has them.
            v: [B, S / N, H, E]; H is a multiple of G, head h reads key head h // (H / G).
            g: the logarithm of the decay, finite and at most 0: floating [B, S / N, H], or
                [B, S / N, H, D] for one per channel of the key.
            beta: floating [B, S / N, H], the rate of the delta rule.
            scale: a positive factor; by default D ** -0.5.
            kept: as in ``ContextParallel.attention``; with ``Received`` the second call computes
                again what needs no message.

        Returns:
            [B, S / N, H, E] in v's type. All gradients are complete on this rank.

        Raises:
            ConfigError: the mask is not causal or has a window, or shapes or types do not fit.
        """
        q, k, v = cast_inputs(q, k, v)
        inputs = (q, k, v, g) if beta is None else (q, k, v, g, beta)
        with self._agreement.after_checks(inputs, (scale, "linear"), None, self._rows, kept):
            check_linear(inputs, self.layout.shard_len)
            scale = check_options(q, scale)
            plan = self._linear_plan(v.shape[2])
            kernel = plan.kernel(self.kernels.linear_choice(q).name, q.device)
        return planned_linear_attention(plan, kernel, LinearInputs(q, k, v, g, beta, scale), kept)

    @torch.compiler.disable
    def short_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        kept: Received | None = None,
    ) -> Tensor:
        """Computes a causal convolution over the last W tokens of the document, per channel.

        Args:
            x: [B, S / N, c].
            weight: [c, W]; the last column multiplies the token itself, as in ``nn.Conv1d``.
            bias: [c].
            kept: passed twice, for recomputation: the second call sends nothing.

        Returns:
            [B, S / N, c] in x's type. The gradient of x is complete on this rank; those of weight
            and bias are this rank's shares of sums over the group.

        Raises:
            ConfigError: the mask is not causal or has a window, or shapes or types do not fit.
        """
        x, weight = cast_inputs(x, weight)
        bias = None if bias is None else cast_inputs(bias)[0]
        options = "convolution", bias is not None and tuple(bias.shape)
        with self._agreement.after_checks((x, weight), options, None, self._rows, kept):
            check_convolution(x, weight, bias, self.layout.shard_len)
            halo = self._halo(weight.shape[1])
        return short_convolution(halo, x, weight, bias, kept)

    def _linear_plan(self, num_heads: int) -> LinearPlan:
        """This rank's plan for a number of value heads."""
        if num_heads not in self._linear_plans:
            shared = self.rank, self.group, self.buffers, self.link_sums
            self._linear_plans[num_heads] = LinearPlan(self.mask, self.layout, num_heads, *shared)
        return self._linear_plans[num_heads]

    def _halo(self, width: int) -> HaloExchange:
        """This rank's part of a convolution of a width."""
        if width not in self._halos:
            shared = self.rank, self.group, self.buffers, self.link_sums
            self._halos[width] = HaloExchange(self.mask, self.layout, width, *shared)
        return self._halos[width]
