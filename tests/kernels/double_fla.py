"""A test double of the package flash-linear-attention 0.6: its signatures and rules, on a CPU.

It computes token by token and is differentiated by autograd, in the type of its inputs. It refuses
what the package refuses or would misread. ``calls`` records what each call asked for.

Shapes: q, k [1, T, H, K], v [1, T, HV, V], s sequences, states [s, HV, K, V].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cp_megatron.kernels.linear_fla import FlaFunctions

Result = tuple[Tensor, Tensor | None]


class FlaDouble:
    """The four functions. A call is (name, lengths, width of values, initial, final)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int], int, bool, bool]] = []

    @property
    def functions(self) -> FlaFunctions:
        return FlaFunctions(
            self.chunk_gated_delta_rule, self.chunk_kda, self.chunk_simple_gla, self.chunk_gla
        )

    def chunk_gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Result:
        assert g.shape == v.shape[:3]
        assert k.shape[-1] <= 256
        options = scale, initial_state, output_final_state, cu_seqlens
        return self._run("gated delta rule", q, k, v, g[..., None], beta, *options)

    def chunk_kda(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Result:
        assert g.shape == (*v.shape[:3], k.shape[-1])
        assert k.shape[-1] <= 256
        options = scale, initial_state, output_final_state, cu_seqlens
        return self._run("kda", q, k, v, g, beta, *options)

    def chunk_simple_gla(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        g_gamma: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Result:
        assert g is not None
        assert g_gamma is None
        assert q.shape[2] == v.shape[2]
        options = scale, initial_state, output_final_state, cu_seqlens
        return self._run("simple gla", q, k, v, g[..., None], None, *options)

    def chunk_gla(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Result:
        assert q.shape == k.shape == g.shape
        assert v.shape[:3] == q.shape[:3]
        options = scale, initial_state, output_final_state, cu_seqlens
        return self._run("gla", q, k, v, g, None, *options)

    def _run(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        beta: Tensor | None,
        scale: float | None,
        initial: Tensor | None,
        final: bool,
        edges: Tensor | None,
    ) -> Result:
        assert edges is not None
        assert edges.dtype == torch.int64
        assert len(q) == 1, "packed sequences are one row"
        assert edges[0] == 0
        assert edges[-1] == q.shape[1] == v.shape[1] == decay.shape[1]
        lengths = edges.diff().tolist()
        assert min(lengths) > 0
        exact = torch.float64 if v.dtype == torch.float64 else torch.float32
        heads, repeats = v.shape[2], v.shape[2] // q.shape[2]
        shape = len(lengths), heads, k.shape[-1], v.shape[-1]
        assert initial is None or (initial.shape == shape and initial.dtype == exact)
        self.calls.append((name, lengths, v.shape[-1], initial is not None, final))
        given: dict[str, Any] = {"q": q, "k": k, "v": v, "g": decay, "beta": beta}
        q, k, v, decay, rate = (None if x is None else x[0].to(exact) for x in given.values())
        q, k = (x.repeat_interleave(repeats, dim=1) for x in (q, k))
        out, states, token = [], [], 0
        for number, length in enumerate(lengths):
            state = v.new_zeros(shape[1:]) if initial is None else initial[number]
            for _ in range(length):
                state = state * decay[token].exp()[..., None]
                u = v[token]
                if rate is not None:
                    u = (u - torch.einsum("hkv,hk->hv", state, k[token])) * rate[token][:, None]
                state = state + k[token][..., None] * u[:, None]
                used = k.shape[-1] ** -0.5 if scale is None else scale
                out.append(torch.einsum("hkv,hk->hv", state, q[token]) * used)
                token += 1
            states.append(state)
        whole = torch.stack(out)[None].to(given["v"].dtype)
        return whole, torch.stack(states) if final else None
