"""What a layer keeps for backward: strategies that wrap around its blocks from outside.

    granularity   kept of a layer                                  computed again in backward
    none          all that autograd saves                          nothing
    selective     the inputs of both blocks, attention's results   the rest, without a message of
                                                                   attention
    full          the input of the layer, possibly on the host     the layer

With ``none``, rows that sequence parallelism gathers are freed and gathered again
(``tensor_parallel/regather.py``); the other levels gather them once more anyway. The MLP can run in
tiles (``sequence_tiles.py``) at every level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cp_megatron.config.schema import MemoryConfig, Recompute
from cp_megatron.context_parallel import KeptAttention
from cp_megatron.model.offload import LayerOffload
from cp_megatron.model.recompute import Pass, recomputed
from cp_megatron.model.sequence_tiles import in_tiles
from cp_megatron.tensor_parallel import LocalWeights, TensorParallel, regathered

Results = TypeVar("Results", Tensor, tuple[Tensor, ...])


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Runs the blocks of one layer so that backward keeps what it should.

    Nothing is recomputed when nothing is differentiated.

    Attributes:
        tp: the tensor parallel group.
        granularity: of this layer.
        tile_size: tokens that go through the MLP at once; None: all.
        offload: where full recomputation keeps the layer's input; None: where it is.
    """

    tp: TensorParallel
    granularity: Recompute
    tile_size: int | None
    offload: LayerOffload | None

    @classmethod
    def of(
        cls, memory: MemoryConfig, layer: int, *, tp: TensorParallel, offload: LayerOffload | None
    ) -> LayerMemory:
        """The strategy of a layer, numbered from 0; only the first layers may be recomputed."""
        number = memory.recompute_num_layers
        is_recomputed = number is None or layer < number
        return cls(
            tp=tp,
            granularity=memory.recompute_granularity if is_recomputed else "none",
            tile_size=memory.mlp_tile_size,
            offload=offload,
        )

    def layer(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """``function(*args, which)``, the whole layer."""
        which = Pass()
        # Called in the layer's forward, so that FSDP has gathered the weights when it runs again.
        if not self._recomputes("full"):
            return function(*args, which)
        hooks = None if self.offload is None else self.offload.hooks()
        return recomputed(function, *args, which, which=which, hooks=hooks)

    def mixer(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """``function(*args, kept)``, from the residual stream to the result of attention."""
        if self._recomputes("selective"):
            return recomputed(function, *args, KeptAttention())
        return function(*args, None)

    def mlp(
        self,
        function: Callable[[Tensor, bool], Tensor],
        x: Tensor,
        weights: LocalWeights,
        which: Pass,
    ) -> Tensor:
        """``function(x, gradient_only)``, from the residual stream to what is added to it.

        Args:
            function: computes every row by itself.
            x: residual stream.
            weights: those that the function reads.
            which: the run of the layer. In the second its result, the end of the layer, is not
                read.
        """
        if self.tile_size is not None:
            return in_tiles(
                function,
                x,
                weights,
                rows=self.tp.rows(self.tile_size, x.shape[0]),
                recompute=self._recomputes("selective", "full"),
                gradient_only=which.is_second,
            )
        if self._recomputes("selective"):
            return recomputed(function, x, False)
        return function(x, False)

    def entered(
        self, function: Callable[..., Results], gathered: Tensor, *args: object, rows: Tensor
    ) -> Results:
        """``function(gathered, *args)``, where ``gathered`` is ``tp.enter(rows)``."""
        if self._recomputes("selective", "full"):
            return function(gathered, *args)
        return regathered(function, gathered, *args, rows=rows, tp=self.tp)

    def _recomputes(self, *levels: Recompute) -> bool:
        return self.granularity in levels and torch.is_grad_enabled()
