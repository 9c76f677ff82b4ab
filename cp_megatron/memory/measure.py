"""What a rank holds during its first step, kind by kind, as it is found.

Two instruments look at the forward pass of the first micro batch. Hooks on what autograd saves say
for which module each piece of memory is kept, weights excluded; ``LiveBytes`` knows what was
allocated and is still there, so that what no hook sees (gradients that the loss computes in
forward, results that a recomputed attention keeps) is found as well, at the module that made it.
Neither changes a number. The rest is counted from the tensors themselves.
"""

from __future__ import annotations

import re
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.memory import predict as kinds
from cp_megatron.memory.live_bytes import LiveBytes, plain
from cp_megatron.memory.predict import Held
from cp_megatron.model.layer import TransformerLayer
from cp_megatron.model.transformer import Transformer

_PARTS = (
    ("attention_norm", kinds.ATTENTION_NORM),
    ("attention", kinds.ATTENTION),
    ("mlp_norm", kinds.MLP_NORM),
    ("mlp", kinds.MLP),
    ("dropout", kinds.DROPOUT),
)
_ENDS = (
    ("embedding", kinds.EMBEDDING),
    ("positions", kinds.EMBEDDING),
    ("dropout", kinds.DROPOUT),
    ("norm", kinds.FINAL_NORM),
)
_OUTSIDE = ""
"""Of the model: the step's own few numbers."""
GRACE = 0.1
"""Seconds: gloo's threads let go of a message's memory a moment after it was waited for."""


class Measured(Protocol):
    """What makes a step: ``train.step.TrainStep``."""

    @property
    def model(self) -> Transformer: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def cp(self) -> ContextParallel: ...
    @property
    def device(self) -> torch.device: ...


class MemoryMeter:
    """A context manager around one ``train_step.step``; ``held`` has the result afterwards.

    On CUDA the totals are the allocator's, which rounds sizes up and whose peak is the process's.

    Args:
        train_step: whose step it is.
    """

    def __init__(self, train_step: Measured) -> None:
        self._train_step = train_step
        self._on_cuda = train_step.device.type == "cuda"
        self._place = _Place(train_step.model)
        self._live = LiveBytes(self._place.allocated)
        self._saved: dict[int, tuple[weakref.ref[torch.UntypedStorage], str]] = {}
        self._hooks, self._forward = ExitStack(), ExitStack()
        self._measured = False
        self._at_start, self._rooms = 0, 0
        self._rows: Counter[str] = Counter()
        self._sizes: Counter[str] = Counter()

    def __enter__(self) -> MemoryMeter:
        model, hooks = self._train_step.model, self._hooks
        parameters, state = self._parameters(), self._state()
        self._sizes[kinds.PARAMETERS] = _num_bytes(parameters)
        self._at_start = self._on_device([*parameters, *state])
        self._rooms = self._train_step.cp.buffers.held_bytes
        for name, module in model.named_modules():
            _keep(hooks, module.register_forward_pre_hook(self._entering(name)))
            _keep(hooks, module.register_forward_hook(self._leaving(name)))
        _keep(hooks, self._train_step.optimizer.register_step_pre_hook(self._before_update))
        if not self._on_cuda:
            hooks.enter_context(self._live)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._forward.close()
        self._hooks.close()
        self._sizes[kinds.OPTIMIZER] = _num_bytes(self._state())
        self._sizes[kinds.EXCHANGE] = self._train_step.cp.buffers.peak_bytes
        if self._on_cuda:
            self._sizes[kinds.PEAK] = torch.cuda.max_memory_allocated(self._train_step.device)
        else:
            self._sizes[kinds.PEAK] = self._at_start + self._live.peak
        self._live.close()
        self._saved.clear()

    def held(self) -> tuple[Held, ...]:
        """What was found, in the order of ``memory_plan.predict``, and the peak at the end."""
        assert self._measured, "a step was measured"
        sizes = self._sizes
        moved = self._on_cuda and not all(x.is_cuda for x in self._parameters())
        detail = kinds.HOST if moved else ""
        permanent = (kinds.PARAMETERS, kinds.GRADIENTS, kinds.OPTIMIZER)
        return (
            *(Held(kind=kind, detail=detail, num_bytes=sizes[kind]) for kind in permanent),
            Held(kind=kinds.GATHERED, num_bytes=sizes[kinds.GATHERED]),
            *(
                Held(kind=kinds.ACTIVATIONS, detail=name, num_bytes=self._rows[name])
                for name in kinds.MODULES
            ),
            Held(kind=kinds.HOST, detail=kinds.INPUTS, num_bytes=sizes[kinds.HOST]),
            *(
                Held(kind=kind, num_bytes=sizes[kind])
                for kind in (kinds.LOGITS, kinds.EXCHANGE, kinds.AFTER_FORWARD, kinds.PEAK)
            ),
        )

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: object) -> None:
            if self._measured:
                return
            if not name:
                self._begin()
            # After FSDP's own hook, which comes first: these are the whole weights.
            if isinstance(module, TransformerLayer):
                self._watch(module.parameters())
            elif not name:
                layers = {id(parameter) for parameter in self._train_step.model.layers.parameters()}
                self._watch(p for p in module.parameters() if id(p) not in layers)
            self._place.enter(name)

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(module: nn.Module, args: object, out: object) -> None:
            if self._measured:
                return
            self._place.leave(name)
            if not name:
                self._end()

        return hook

    def _begin(self) -> None:
        """The first forward begins."""
        if self._on_cuda:
            self._forward.enter_context(self._live)
        self._forward.enter_context(saved_tensors_hooks(self._save, lambda x: x))

    def _end(self) -> None:
        """The first forward is over, and all that backward reads is there."""
        self._measured = True
        self._forward.close()
        if not self._on_cuda:
            time.sleep(GRACE)
        sizes, live = self._sizes, self._live
        seen = set()
        for key, (reference, module) in self._saved.items():
            storage = reference()
            if storage is not None:
                seen.add(key)
                self._rows[module] += storage.nbytes()  # some are emptied until backward
        for key, allocation in live.alive().items():
            if key not in seen and allocation.place != _OUTSIDE:
                self._rows[allocation.place] += allocation.num_bytes
        sizes[kinds.GATHERED] = self._rows.pop(kinds.GATHERED, 0)
        # Messages' memory was allocated where attention runs.
        rooms = self._train_step.cp.buffers.held_bytes - self._rooms
        self._rows[kinds.ATTENTION] -= rooms
        sizes[kinds.LOGITS] = live.peaks[kinds.LOGITS]
        offload = self._train_step.model.offload
        sizes[kinds.HOST] = 0 if offload is None else offload.held_bytes
        if self._on_cuda:
            sizes[kinds.AFTER_FORWARD] = torch.cuda.memory_allocated(self._train_step.device)
        else:
            found = sum(self._rows.values()) + sizes[kinds.GATHERED] + rooms
            sizes[kinds.AFTER_FORWARD] = self._at_start + found

    def _save(self, x: Tensor) -> Tensor:
        for part in plain(x):
            storage = part.untyped_storage()
            key = storage._cdata
            found = self._saved.get(key)
            is_new = found is None or found[0]() is None  # an address may be used again
            if is_new and self._live.place_of(storage) != kinds.GATHERED:
                self._saved[key] = weakref.ref(storage), self._place.saved()
        return x

    def _watch(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            for part in plain(parameter.detach()):
                self._live.adopt(part, kinds.GATHERED)

    def _before_update(self, *_: object) -> None:
        grads = [p.grad for p in self._train_step.model.parameters() if p.grad is not None]
        self._sizes[kinds.GRADIENTS] = _num_bytes(_local(grad) for grad in grads)

    def _parameters(self) -> list[Tensor]:
        return [_local(parameter) for parameter in self._train_step.model.parameters()]

    def _state(self) -> list[Tensor]:
        rows = self._train_step.optimizer.state.values()
        return [_local(x) for row in rows for x in row.values() if isinstance(x, Tensor)]

    def _on_device(self, tensors: Iterable[Tensor]) -> int:
        return _num_bytes(x for x in tensors if x.device.type == self._train_step.device.type)


class _Place:
    """Where in the model the computation is, in the words of the report."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        assert model.embedding is not None, "the whole model"
        self._width = model.embedding.weight.shape[0] // model.tp.size
        self._inside: list[str] = []
        self._before_mlp = True
        self._before_loss = True

    def enter(self, name: str) -> None:
        """A module begins."""
        if re.fullmatch(r"layers\.\d+", name):
            self._before_mlp = True
        self._inside.append(name)

    def leave(self, name: str) -> None:
        """A module has ended."""
        self._inside.pop()
        if name == "norm":
            self._before_loss = False
        if name.endswith(".mlp_norm"):
            self._before_mlp = False

    def saved(self) -> str:
        """For what autograd saves here: of a layer itself these are attention's or the inputs."""
        name = self._inside[-1]
        layer = self._model.get_submodule(name)
        if isinstance(layer, TransformerLayer) and layer.memory.granularity != "none":
            return kinds.INPUTS
        return self._named(name)

    def allocated(self, func: Any, tensor: Tensor) -> str:
        """For memory that is allocated here."""
        if func.namespace == "fsdp":
            return kinds.GATHERED
        if not self._inside:
            return _OUTSIDE
        place = self._named(self._inside[-1])
        if place == kinds.LOSS and self._is_logits(tensor):
            return kinds.LOGITS
        return place

    def _is_logits(self, tensor: Tensor) -> bool:
        """Rows of this rank's part of the vocabulary."""
        return tensor.ndim == 2 and tensor.shape[1] == self._width

    def _named(self, name: str) -> str:
        within = re.sub(r"^layers\.\d+\.?", "", name)
        if within != name:
            if not within:
                return kinds.ATTENTION if self._before_mlp else kinds.MLP
            return _first(_PARTS, within)
        if name:
            return _first(_ENDS, name)
        return kinds.OTHER if self._before_loss else kinds.LOSS


def _first(table: Iterable[tuple[str, str]], path: str) -> str:
    """The row of the outermost module of a path."""
    return dict(table)[path.split(".")[0]]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _keep(stack: ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)
