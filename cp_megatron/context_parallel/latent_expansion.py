"""Keys and values of latent attention, expanded from latents before or after these travel.

Shapes: B = batch, S = tokens of the shard, K = keys of a shard or an arrival, H = query heads,
n = number of heads that are expanded together, L = width of a latent, R = width of a rotary key,
P = width of the other part of a key, D = P + R, E = width of a value.

    latent [B, K, L]   rotary_key [B, K, R]   weight [H * (P + E), L]
    k [B, K, H, D]: of head h, its first P rows of ``weight`` @ latent, then rotary_key
    v [B, K, H, E]: of head h, its other E rows of ``weight`` @ latent

A message [K, B, L + R] holds a latent and a rotary key as if they were the key and the value of one
head. For each head, a matrix [D + E, L + R] turns them into its key and value::

                 latent      rotary key
    P rows    weight's rows      0
    R rows         0          identity
    E rows    weight's rows      0

The transposed matrices turn the gradients of keys and values into those of the message, summed over
heads. The gradient of a matrix contains that of the weight's rows.

Source: multi-head latent attention, DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.context_parallel.keys import KeyValues
from cp_megatron.context_parallel.partials import Portion
from cp_megatron.errors import ConfigError
from cp_megatron.plan.buffer_sizes import EXPANDED, EXPANDED_GRADIENTS, expanded_portions
from cp_megatron.plan.heads import HeadGroup
from cp_megatron.plan.tiling import Span, Tile


def check_latent_shapes(
    q: Tensor, latent: Tensor, rotary_key: Tensor, weight: Tensor, num_tokens: int, seq_len: int
) -> tuple[int, int, int]:
    """Refuses inputs of latent attention that do not fit each other or the layout.

    Args:
        q, latent, rotary_key, weight: the inputs; q is [B, S, H, D], and the others are as above
            with K = S.
        num_tokens: the tokens that this rank holds.
        seq_len: the tokens of the whole row.

    Returns:
        H, P and E.

    Raises:
        ConfigError: a shape, type, device or stride that latent attention cannot take.
    """
    named = {"q": q, "latent": latent, "rotary_key": rotary_key, "weight": weight}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())

    def require(fits: bool, rule: str) -> None:
        if not fits:
            raise ConfigError("latent attention", shapes, rule)

    kinds = "q [batch, tokens, heads, head_dim], latent and rotary_key [batch, tokens, width], "
    dims = [x.ndim for x in named.values()]
    require(dims == [4, 3, 3, 2], f"must be {kinds}weight [heads * rows, width of latent]")
    rotary_dim, width, heads = rotary_key.shape[2], latent.shape[2], q.shape[2]
    same = q.shape[:2] == latent.shape[:2] == rotary_key.shape[:2]
    require(same, "must agree in batch and tokens")
    require(q.shape[1] == num_tokens, f"tokens must be this rank's {num_tokens} of {seq_len}")
    require(all(x.numel() for x in named.values()), "must not be empty")
    require(weight.shape[1] == width, "latent and the columns of weight must be equally wide")
    plain_dim, rows = q.shape[3] - rotary_dim, weight.shape[0]
    require(plain_dim > 0, "queries must be wider than rotary_key")
    rule = f"weight must have equally many rows for each head, more than {plain_dim}"
    require(rows % heads == 0 and rows // heads > plain_dim, rule)
    require(len({x.dtype for x in named.values()}) == 1, "must be of one type")
    require(len({x.device for x in named.values()}) == 1, "must be on one device")
    for name, x in named.items():
        require(x.is_contiguous(), f"{name} must be contiguous, as {name}.contiguous() is")
    return heads, plain_dim, rows // heads - plain_dim


def expand_heads(
    latent: Tensor, rotary_key: Tensor, weight: Tensor, num_heads: int, plain_dim: int
) -> tuple[Tensor, Tensor]:
    """Expands k [B, S, H, D] and v [B, S, H, E], which are contiguous and can be differentiated.

    Args:
        latent, rotary_key, weight: [B, S, L], [B, S, R] and [H * (P + E), L].
        num_heads, plain_dim: H and P.
    """
    heads = rearrange(latent @ weight.T, "b s (h w) -> b s h w", h=num_heads)
    shared = rotary_key[:, :, None].expand(-1, -1, num_heads, -1)
    return torch.cat((heads[..., :plain_dim], shared), -1), heads[..., plain_dim:].contiguous()


class LatentExpansion:
    """Expands the messages of one pass, and sums the gradients that reach the weight.

    It is an ``Expansion`` of ``partials.py``. Each matrix is made once and kept for the pass.

    Args:
        weight: [H * (P + E), L].
        num_heads, plain_dim, rotary_dim: H, P and R.
        memory: provides the memory of expanded heads.
        dweight: as ``weight``, in float32 (float64 for float64): the sum of its gradients. None in
            forward, and if the weight needs no gradient.
    """

    def __init__(
        self,
        weight: Tensor,
        num_heads: int,
        plain_dim: int,
        rotary_dim: int,
        memory: Workspace,
        dweight: Tensor | None,
    ) -> None:
        self._weight = weight.unflatten(0, (num_heads, -1))  # [H, P + E, L]
        self._dweight = None if dweight is None else dweight.unflatten(0, (num_heads, -1))
        self._plain, self._rotary, self._memory = plain_dim, rotary_dim, memory
        self._matrices: dict[Span, Tensor] = {}

    def portions(
        self,
        tiles: Sequence[Tile],
        keys: KeyValues,
        groups: Sequence[HeadGroup],
        grads: KeyValues | None,
    ) -> Iterator[Portion]:
        """Expands one run of heads after the other; see ``Expansion``."""
        message, spans = _message(keys), _columns(tiles)
        width, dim = self._weight.shape[1] + self._rotary, self._plain + self._rotary
        head_bytes = message.shape[0] * message.shape[1] * width * message.dtype.itemsize
        heads = [part for g in groups for part in expanded_portions(g.queries, head_bytes)]
        for start, stop in heads if spans else []:
            matrix, num_heads = self._matrix((start, stop)), stop - start
            shape = *message.shape[:2], num_heads * width
            expanded = self._memory.take(EXPANDED, shape, message.dtype)
            for a, b in spans:
                torch.mm(_rows(message, a, b), matrix.T, out=_rows(expanded, a, b))
            part = Portion(slice(start, stop), KeyValues.view(expanded, num_heads, dim))
            if grads is None:
                yield part
                continue
            assert grads.packed is not None
            sums = self._memory.take(EXPANDED_GRADIENTS, shape, grads.packed.dtype)
            for a, b in spans:
                sums[a:b] = 0
            yield replace(part, grads=KeyValues.view(sums, num_heads, dim))
            for a, b in spans:
                gradient = _rows(sums, a, b)
                _rows(grads.packed, a, b).add_(_product(gradient, matrix))
                if self._dweight is not None:
                    own = self._dweight[start:stop]
                    self._add_to_weight(own, _product(gradient.T, _rows(message, a, b)))

    def _matrix(self, heads: Span) -> Tensor:
        """[n * (D + E), L + R]: expands a message to all keys, then all values, of some heads."""
        if heads in self._matrices:
            return self._matrices[heads]
        weight, latent_dim = self._weight[slice(*heads)], self._weight.shape[2]
        rows = weight.shape[0] * (weight.shape[1] + self._rotary)
        matrix = weight.new_zeros((rows, latent_dim + self._rotary))
        keys, values = self._parts(matrix, weight.shape[0])
        keys[:, : self._plain, :latent_dim] = weight[:, : self._plain]
        keys[:, self._plain :, latent_dim:].diagonal(dim1=1, dim2=2).fill_(1)
        values[..., :latent_dim] = weight[:, self._plain :]
        return self._matrices.setdefault(heads, matrix)

    def _parts(self, matrix: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """[n, D, L + R] and [n, E, L + R], the rows of keys and of values."""
        edge = num_heads * (self._plain + self._rotary)
        keys, values = matrix[:edge], matrix[edge:]
        return keys.unflatten(0, (num_heads, -1)), values.unflatten(0, (num_heads, -1))

    def _add_to_weight(self, dweight: Tensor, dmatrix: Tensor) -> None:
        """Adds the gradient of a matrix to that of its heads' weight, [n, P + E, L]."""
        num_heads, _, latent_dim = dweight.shape
        keys, values = self._parts(dmatrix, num_heads)
        dweight[:, : self._plain].add_(keys[:, : self._plain, :latent_dim])
        dweight[:, self._plain :].add_(values[..., :latent_dim])


def _message(keys: KeyValues) -> Tensor:
    """[K, B, L + R]: the message itself, or the shard's latents and rotary keys as one."""
    if keys.packed is not None:
        return keys.packed
    num_tokens = keys.k.shape[1]
    return keys.pack([(0, num_tokens)], keys.k.new_empty(keys.message_shape(num_tokens)))


def _columns(tiles: Sequence[Tile]) -> list[Span]:
    """The keys that any of the tiles reads, as ascending runs."""
    spans: list[Span] = []
    for start, stop in sorted((tile.k0, tile.k1) for tile in tiles):
        if spans and start <= spans[-1][1]:
            first, last = spans.pop()
            spans.append((first, max(last, stop)))
        else:
            spans.append((start, stop))
    return spans


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Tokens ``start:stop`` of [K, B, w] as [(stop - start) * B, w], a view."""
    return x[start:stop].flatten(0, 1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y in x's type, the type of sums; y has the type of activations.

    On CUDA, x is rounded to the type of y first: products of bfloat16 are many times faster there,
    and their sums are float32 all the same. Without latents, the gradients of keys are rounded,
    too, before the backward of their projection reads them.
    """
    if x.is_cuda and y.dtype != x.dtype:
        return torch.mm(x.to(y.dtype), y, out_dtype=x.dtype)
    return x @ y.to(x.dtype)
