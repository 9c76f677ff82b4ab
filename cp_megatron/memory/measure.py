"""Measures what a rank holds during its first step, kind by kind.

Two instruments observe the forward passes before the first backward pass (of the first micro batch,
if there are no pipeline stages), without changing a number. Hooks
on what autograd saves attribute each piece of memory, except weights, to the module that keeps it.
``LiveBytes`` knows what was allocated and is still alive; it finds what no hook sees (gradients
that the loss computes in forward, results that a recomputed attention keeps) at the module that
allocated it. Permanent tensors are counted directly.
"""

from __future__ import annotations

import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.memory import kinds
from cp_megatron.memory.kinds import Held
from cp_megatron.memory.live_bytes import LiveBytes, plain
from cp_megatron.model.layer import TransformerLayer
from cp_megatron.model.transformer import Transformer
from cp_megatron.pipeline import StageLinks

_AT_ENDS: Mapping[str, str] = MappingProxyType(
    {"embedding": kinds.EMBEDDING, "positions": kinds.EMBEDDING}
    | {"norm": kinds.FINAL_NORM, "head": kinds.LOSS}
)
_OUTSIDE = ""
"""The place of tensors that are allocated outside of the model."""
GRACE = 0.1
"""Seconds to wait for gloo's threads, which release a message's memory shortly after its wait."""


class MemoryMeter:
    """A context manager around one training step; ``held`` returns the result afterwards.

    On CUDA the totals are the allocator's, which rounds sizes up, and the peak is the process's.

    Args:
        in_flight: how many forward passes come before the first backward pass.
        links: the messages between pipeline stages.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        cp: ContextParallel,
        device: torch.device,
        *,
        in_flight: int = 1,
        links: StageLinks | None = None,
    ) -> None:
        self._model, self._optimizer, self._buffers = model, optimizer, cp.buffers
        self._device, self._on_cuda = device, device.type == "cuda"
        self._place = _Place(model)
        self._live = LiveBytes(self._place.allocated)
        self._saved: dict[int, tuple[weakref.ref[torch.UntypedStorage], str]] = {}
        self._hooks, self._forward = ExitStack(), ExitStack()
        self._num_left, self._stored = in_flight, set[int]()
        self._links = links or StageLinks()
        self._at_start, self._buffers_at_start = 0, 0
        self._sizes: Counter[str] = Counter()

    def __enter__(self) -> MemoryMeter:
        hooks = self._hooks
        parameters, state = self._parameters(), self._state()
        self._sizes[kinds.PARAMETERS] = _num_bytes(parameters)
        held = map(_local, self._model.parameters())
        self._stored = {x.untyped_storage()._cdata for x in held}
        on_device = (x for x in (*parameters, *state) if x.device.type == self._device.type)
        self._at_start = _num_bytes(on_device)
        self._buffers_at_start = self._buffers.held_bytes
        for name, module in self._model.named_modules():
            hooks.callback(module.register_forward_pre_hook(self._entering(name)).remove)
            hooks.callback(module.register_forward_hook(self._leaving(name)).remove)
        hooks.callback(self._optimizer.register_step_pre_hook(self._before_update).remove)
        if not self._on_cuda:
            hooks.enter_context(self._live)
        return self

    def __exit__(self, *error: object) -> None:
        self._forward.close()
        self._hooks.close()
        self._sizes[kinds.OPTIMIZER] = _num_bytes(self._state())
        self._sizes[kinds.EXCHANGE] = self._buffers.peak_bytes
        if self._on_cuda:
            self._sizes[kinds.PEAK] = torch.cuda.max_memory_allocated(self._device)
        else:
            self._sizes[kinds.PEAK] = self._at_start + self._live.peak
        self._live.close()
        self._saved.clear()

    def held(self) -> tuple[Held, ...]:
        """The measured bytes, in the order of ``predict``, and the peak at the end."""
        assert self._num_left == 0, "a step was measured"
        moved = self._on_cuda and not all(x.is_cuda for x in self._parameters())
        permanent = (kinds.PARAMETERS, kinds.GRADIENTS, kinds.OPTIMIZER)
        others = (kinds.LOGITS, kinds.EXCHANGE, kinds.AFTER_FORWARD, kinds.PEAK)
        rows = [(kind, kinds.HOST if moved else "", kind) for kind in permanent]
        rows += [(kind, "", kind) for kind in (kinds.GATHERED, kinds.WHOLE)]
        rows += [(kinds.ACTIVATIONS, name, name) for name in kinds.MODULES]
        rows += [(kinds.HOST, kinds.RECOMPUTED, kinds.HOST), *((kind, "", kind) for kind in others)]
        return tuple(Held(kind=x, detail=y, num_bytes=self._sizes[name]) for x, y, name in rows)

    def _entering(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._num_left:
                return
            if not name:  # a forward pass begins
                if self._on_cuda:
                    self._forward.enter_context(self._live)
                self._forward.enter_context(saved_tensors_hooks(self._save, lambda x: x))
                if args[0].is_floating_point():  # from another stage
                    self._live.adopt(args[0], kinds.BETWEEN)
            self._watch(module)
            self._place.enter(name)

        return hook

    def _leaving(self, name: str) -> Callable[[nn.Module, object, Any], None]:
        def hook(module: nn.Module, args: object, out: Any) -> None:
            if self._num_left:
                self._place.leave(name)
            if not name:
                self._end_pass(out[0] if isinstance(out, tuple) else out)

        return hook

    def _end_pass(self, result: Tensor) -> None:
        """After a forward pass; its result is the sum to train, or goes to another stage."""
        result.register_hook(self._before_backward)
        if not self._num_left:
            return
        self._forward.close()
        if result.ndim:
            self._live.adopt(result, kinds.BETWEEN)
        self._num_left -= 1
        if self._num_left == 0:
            self._count()

    def _count(self) -> None:
        """Counts what is held now, when all that backward reads exists."""
        if not self._on_cuda:
            time.sleep(GRACE)
        sizes, live, by_place = self._sizes, self._live, Counter[str]()
        saved = set()
        for key, (reference, place) in self._saved.items():
            storage = reference()
            if storage is not None:
                saved.add(key)
                by_place[place] += storage.nbytes()  # 0 for storages that backward fills again
        for key, allocation in list(live.alive.items()):
            if key not in saved and allocation.place != _OUTSIDE:
                by_place[allocation.place] += allocation.num_bytes
        sizes[kinds.GATHERED] = by_place.pop(kinds.GATHERED, 0)
        # The buffers of messages are allocated where attention runs.
        buffers = self._buffers.held_bytes - self._buffers_at_start
        by_place[kinds.ATTENTION] -= buffers
        by_place[kinds.BETWEEN] += self._links.receiving_bytes
        sizes[kinds.LOGITS] = live.peaks[kinds.LOGITS]
        offload = self._model.offload
        sizes[kinds.HOST] = 0 if offload is None else offload.held_bytes
        if self._on_cuda:
            sizes[kinds.AFTER_FORWARD] = torch.cuda.memory_allocated(self._device)
        else:
            new = by_place.total() + sizes[kinds.GATHERED] + buffers
            sizes[kinds.AFTER_FORWARD] = self._at_start + new
        sizes.update(by_place)

    def _save(self, x: Tensor) -> Tensor:
        for part in plain(x):
            storage = part.untyped_storage()
            key = storage._cdata
            if key in self._stored:
                continue
            known = self._saved.get(key)
            is_new = known is None or known[0]() is None  # an address may be used again
            allocation = self._live.alive.get(key)
            if is_new and (allocation is None or allocation.place != kinds.GATHERED):
                self._saved[key] = weakref.ref(storage), self._place.saved()
        return x

    def _watch(self, module: nn.Module) -> None:
        """Finds the tensors that have taken the place of parameters before this hook ran."""
        for owner in module.modules():
            weights = [x.detach() for x in owner._parameters.values() if x is not None]
            for part in (part for weight in weights for part in plain(weight)):
                if part.untyped_storage()._cdata not in self._stored:
                    self._live.adopt(part, kinds.GATHERED)

    def _before_backward(self, _: Tensor) -> None:
        """Counts the gradients of whole weights that earlier backward passes left."""
        held = sum(map(_whole_gradients, self._model.modules()))
        self._sizes[kinds.WHOLE] = max(self._sizes[kinds.WHOLE], held)

    def _before_update(self, *_: object) -> None:
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        self._sizes[kinds.GRADIENTS] = _num_bytes(_local(grad) for grad in grads)

    def _parameters(self) -> list[Tensor]:
        return [_local(parameter) for parameter in self._model.parameters()]

    def _state(self) -> list[Tensor]:
        states = self._optimizer.state.values()
        return [_local(x) for state in states for x in state.values() if isinstance(x, Tensor)]


class _Place:
    """Tracks where in the model the computation is, and names the kind of memory used there."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._vocab_width = model.spec.head.padded_vocab // model.tp.size
        self._inside: list[str] = []
        self._before_mlp = True
        self._before_loss = True

    def enter(self, name: str) -> None:
        if not name:
            self._before_loss = True
        if re.fullmatch(r"layers\.\d+", name):
            self._before_mlp = True
        self._inside.append(name)

    def leave(self, name: str) -> None:
        self._inside.pop()
        if name == "norm":
            self._before_loss = False
        if name.endswith((".attention.out", ".recurrence.out")):
            self._before_mlp = False

    def saved(self) -> str:
        """The kind of what autograd saves here.

        A layer itself saves the inputs of its recomputed blocks, or what attention keeps.
        """
        name = self._inside[-1]
        layer = self._model.get_submodule(name)
        if isinstance(layer, TransformerLayer) and layer.memory.granularity != "none":
            return kinds.INPUTS
        return self._kind_of(name)

    def allocated(self, func: Any, tensor: Tensor) -> str:
        """The kind of memory that ``func`` allocates here."""
        if func.namespace == "fsdp":
            return kinds.GATHERED
        if not self._inside:
            return _OUTSIDE
        kind = self._kind_of(self._inside[-1])
        is_logits = tensor.ndim == 2 and tensor.shape[1] == self._vocab_width
        return kinds.LOGITS if kind == kinds.LOSS and is_logits else kind

    def _kind_of(self, name: str) -> str:
        in_layer = re.fullmatch(r"layers\.\d+\.?(.*)", name)
        if in_layer is None and name:
            return _AT_ENDS[name.split(".")[0]]
        if in_layer is None:
            return kinds.OTHER if self._before_loss else kinds.LOSS
        block = kinds.ATTENTION if self._before_mlp else kinds.MLP
        return kinds.IN_LAYER.get(in_layer[1].split(".")[0], block)


def _whole_gradients(module: nn.Module) -> int:
    """Bytes of the unreduced gradients of a unit of FSDP, which has no public way to ask for it."""
    group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
    gradients = []
    for parameter in [] if group is None else group.fsdp_params:
        gradients.append(parameter.unsharded_accumulated_grad)
        if hasattr(parameter, "_unsharded_param"):  # it has been gathered
            gradients.append(parameter._unsharded_param.grad)
    return _num_bytes(_local(gradient) for gradient in gradients if gradient is not None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
