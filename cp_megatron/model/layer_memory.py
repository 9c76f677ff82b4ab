"""Chooses what a layer keeps for backward, with strategies that wrap its blocks from outside.

    granularity   kept of a layer                                  computed again in backward
    none          all that autograd saves                          nothing
    selective     the inputs of both blocks, attention's results   the rest, without a message of
                                                                   attention
    full          the input of the layer and, if asked, the        the rest, with the messages of
                  results of attention; possibly on the host       attention unless it is kept

A recurrence sends nothing again with either: its states are few, and are kept too. Neither is a
router's choice made again: another run could choose otherwise, and the ranks have told each other.

Recomputation is torch's own non-reentrant ``checkpoint`` (Chen et al. 2016, arXiv:1604.06174). With
``none``, rows that sequence parallelism gathers are freed and gathered again
(``tensor_parallel/linear.py``); the other levels gather them again anyway. At every level the MLP
can run in tiles (``sequence_tiles.py``). The states of torch's random generators are not kept,
because a layer draws nothing from them: what dropout drops is a hash (``kernels/dropout.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cp_megatron.config.schema import MemoryConfig, Recompute
from cp_megatron.context_parallel import KeptAttention, Received
from cp_megatron.expert_parallel import Dispatch
from cp_megatron.model.offload import LayerOffload
from cp_megatron.model.row_counts import RowCounts
from cp_megatron.model.sequence_tiles import TileFunction, in_tiles
from cp_megatron.tensor_parallel import Entered, LocalWeights, TensorParallel

Whole = TypeVar("Whole")

_recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class KeptMixer:
    """What the first run of a mixer keeps for a second one.

    Attributes:
        results: those of attention or of a recurrence; None if they are computed again.
        states, halo: what a recurrence and its convolution received.
    """

    def __init__(self, results: KeptAttention | None) -> None:
        self.results, self.states, self.halo = results, Received(), Received()


@dataclass(frozen=True)
class Routing:
    """What a mixture of experts decides once for a micro batch.

    Attributes:
        dispatch: which experts the tokens of this rank go to, and how many rows the ranks exchange.
        rows: how often experts were chosen in each row; None if nobody asks.
    """

    dispatch: Dispatch
    rows: RowCounts | None


class KeptRouting:
    """What the first run of a mixture of experts decided, for a second one.

    Attributes:
        first: set by the first run.
    """

    def __init__(self) -> None:
        self.first: Routing | None = None


class Pass:
    """A run of a layer.

    Attributes:
        is_second: whether the layer is being recomputed, in backward, for the tensors that autograd
            saves; the result of a recomputation is not used.
        kept, routing: what the first run keeps for the second one.
    """

    def __init__(self) -> None:
        self.is_second, self.kept, self.routing = False, KeptMixer(None), KeptRouting()

    @contextmanager
    def second(self) -> Iterator[None]:
        self.is_second = True
        try:
            yield
        finally:
            self.is_second = False


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Runs the blocks of one layer so that backward keeps what it should.

    Each method takes a function and its arguments. A recomputed function must get everything that
    differs between calls as arguments: a captured name may refer to something else in backward.
    Nothing is recomputed when nothing is differentiated.

    Attributes:
        tp: the tensor parallel group.
        granularity: of this layer.
        keeps_attention: full recomputation keeps the results of the layer's attention.
        tile_size: tokens that go through the MLP at once; None: all.
        offload: where full recomputation keeps what it keeps; None: where it is.
    """

    tp: TensorParallel
    granularity: Recompute
    keeps_attention: bool
    tile_size: int | None
    offload: LayerOffload | None

    @classmethod
    def of(
        cls,
        memory: MemoryConfig,
        layer: int,
        *,
        attends: bool,
        tp: TensorParallel,
        offload: LayerOffload | None,
    ) -> LayerMemory:
        """The strategy of a layer, numbered from 0; only the first layers may be recomputed.
        ``attends`` says that its mixer is attention."""
        number = memory.recompute_num_layers
        is_recomputed = number is None or layer < number
        return cls(
            tp=tp,
            granularity=memory.recompute_granularity if is_recomputed else "none",
            keeps_attention=memory.recompute_keeps_attention and attends,
            tile_size=memory.mlp_tile_size,
            offload=offload,
        )

    @property
    def keeps_mlp(self) -> bool:
        """Whether ``mlp`` just calls its function."""
        return self.tile_size is None and not self._recomputes("selective")

    def layer(self, function: Callable[..., Whole], *args: object) -> Whole:
        """``function(*args, layer_pass)``, the whole layer."""
        layer_pass = Pass()
        # Called in the layer's forward, so that FSDP has gathered the weights when it runs again.
        if not self._recomputes("full"):
            return function(*args, layer_pass)
        if self.keeps_attention:
            store = self.offload
            layer_pass.kept = KeptMixer(
                KeptAttention() if store is None else KeptAttention(store.pack, store.unpack)
            )
        with nullcontext() if self.offload is None else self.offload.hooks():
            return _recomputed(  # type: ignore[return-value]
                function,
                *args,
                layer_pass,
                context_fn=lambda: (nullcontext(), layer_pass.second()),
            )

    def mixer(self, function: Callable[..., Tensor], layer_pass: Pass, *args: object) -> Tensor:
        """``function(*args, kept)``, from the residual stream to the result of the mixer; ``kept``
        is a ``KeptMixer``, or None if nothing is computed again."""
        if self._recomputes("selective"):
            kept = KeptMixer(KeptAttention())
            return _recomputed(function, *args, kept)  # type: ignore[return-value]
        return function(*args, layer_pass.kept if self._recomputes("full") else None)

    def mixture(self, function: Callable[..., Whole], layer_pass: Pass, *args: object) -> Whole:
        """``function(*args, kept)``, a mixture of experts; ``kept`` is a ``KeptRouting``, or None
        if nothing is computed again."""
        assert self.tile_size is None, "tokens of a tile would be sent on their own"
        if self._recomputes("selective"):
            return _recomputed(function, *args, KeptRouting())  # type: ignore[return-value]
        return function(*args, layer_pass.routing if self._recomputes("full") else None)

    def mlp(
        self, function: TileFunction, x: Tensor, weights: LocalWeights, layer_pass: Pass
    ) -> Tensor:
        """``function(x, gradient_only)``, from the residual stream to what is added to it.

        Args:
            function: computes every row by itself.
            x: residual stream.
            weights: those that the function reads.
            layer_pass: the run of the layer, which this function ends.
        """
        if self.tile_size is not None:
            rows, again = self.tp.rows(self.tile_size, x.shape[0]), layer_pass.is_second
            recompute = self._recomputes("selective", "full")
            return in_tiles(
                function, x, weights, rows=rows, recompute=recompute, gradient_only=again
            )
        if self._recomputes("selective"):
            return _recomputed(function, x, False)  # type: ignore[return-value]
        return function(x, False)

    def entered(self, rows: Tensor) -> Entered:
        """Lets rows enter tensor parallelism. What is computed again gathers them again anyway."""
        return Entered(rows, self.tp, keeps=self._recomputes("selective", "full"))

    def _recomputes(self, *levels: Recompute) -> bool:
        return self.granularity in levels and torch.is_grad_enabled()
