"""What a pipeline stage keeps for the backward passes to come, by the module that keeps it.

With several stages, backward passes come back late: a stage keeps what several forward passes of
its chunks leave, and between chunks the residual stream:

    received --> x --> layers of the chunk --> y --> sent
                 kept until the backward pass, as y is, and as is what the layers keep
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from cp_megatron.config import MemoryConfig
from cp_megatron.memory import kinds
from cp_megatron.memory.expert_bytes import report_bytes, row_number_bytes
from cp_megatron.plan.pipeline import PipelinePlan
from cp_megatron.plan.stages import Chunk, Stages
from cp_megatron.spec import ActivationSizes, ModelSpec, RotarySpec


@dataclass(frozen=True)
class PassesInFlight:
    """The forward passes of a stage before its first backward pass.

    Attributes:
        chunks: those of the stage.
        counts: how many passes each chunk has made, by its number.
        num_microbatches: the micro batches that these passes belong to.
        receives_next: the pass that follows them waits for a message, into memory of its own.
        meets_gradients: as many passes are in flight again when all chunks have made a backward
            pass.
        accumulating: the numbers of chunks that have made a backward pass when the last backward
            pass of the step begins.
    """

    chunks: tuple[Chunk, ...]
    counts: Mapping[int, int]
    num_microbatches: int
    receives_next: bool
    meets_gradients: bool
    accumulating: frozenset[int]

    @classmethod
    def of(cls, stages: Stages, stage: int, num_microbatches: int) -> PassesInFlight:
        """The passes of a stage in a step with so many micro batches."""
        plan = PipelinePlan(stages.num_stages, num_microbatches, stages.num_chunks)
        actions = plan.actions(stage)
        first, (following, *_) = actions[: plan.in_flight(stage)], actions[plan.in_flight(stage) :]
        assert {action.kind for action in first} == {"forward"}
        last_forward = max(i for i, action in enumerate(actions) if action.kind == "forward")
        before = actions[:last_forward]
        backward = [action.chunk for action in actions if action.kind == "backward"]
        return cls(
            chunks=stages.of(stage),
            counts=Counter(action.chunk for action in first),
            num_microbatches=len({action.microbatch for action in first}),
            receives_next=plan.received(stage, following) is not None,
            meets_gradients={action.chunk for action in before if action.kind == "backward"}
            == set(range(stages.num_chunks)),
            accumulating=frozenset(backward[:-1]),
        )

    @property
    def number(self) -> int:
        """How many passes are in flight."""
        return sum(self.counts.values())

    @property
    def has_head(self) -> bool:
        """Whether the stage computes the loss."""
        return any(chunk.has_head for chunk in self.chunks)


@dataclass(frozen=True)
class KeptActivations:
    """What autograd and the pipeline keep on a rank.

    Args:
        per_batch: each micro batch has documents, and so positions, of its own.
    """

    spec: ModelSpec
    memory: MemoryConfig
    sizes: ActivationSizes
    passes: PassesInFlight
    per_batch: bool

    def by_module(self) -> tuple[Counter[str], int]:
        """Bytes by the names in ``MODULES``, and bytes on the host."""
        kept, on_host = Counter[str](), 0
        for number, count in self.passes.counts.items():
            found, moved = self._of_pass(self.passes.chunks[number])
            kept.update({name: count * num_bytes for name, num_bytes in found.items()})
            on_host += count * moved
        if self.passes.receives_next:
            kept[kinds.BETWEEN] += self._stream
        layouts = self.passes.num_microbatches if self.per_batch else 1
        starts = any(chunk.has_embedding for chunk in self.passes.chunks)
        if starts and self.spec.positions is not None:
            kept[kinds.EMBEDDING] += layouts * self.spec.positions.kept_bytes(self.sizes)
        for name, num_bytes in self._rotations():
            kept[name] += layouts * num_bytes
        return kept, on_host

    @property
    def _stream(self) -> int:
        return self.sizes.stream_bytes(self.spec.norm.width)

    @cached_property
    def _levels(self) -> tuple[str, ...]:
        """What is recomputed of each layer of the model."""
        number, level = self.memory.recompute_num_layers, self.memory.recompute_granularity
        layers = range(len(self.spec.layers))
        return tuple(level if number is None or i < number else "none" for i in layers)

    def _of_pass(self, chunk: Chunk) -> tuple[Counter[str], int]:
        """Bytes that one pass through a chunk keeps, by module, and bytes on the host."""
        spec, sizes, kept, on_host = self.spec, self.sizes, Counter[str](), 0
        if chunk.has_embedding:
            kept[kinds.EMBEDDING] = spec.embedding.kept_bytes(sizes)
        elif not self._input_is_kept(chunk):
            kept[kinds.BETWEEN] += self._stream
        for number in chunk.layers:
            found = self._of_layer(number)
            on_host += self._move_to_host(number, found)
            for name, num_bytes in found.items():
                kept[kinds.IN_LAYER[name]] += num_bytes
        if chunk.has_head:
            kept[kinds.FINAL_NORM] = spec.norm.kept_bytes(sizes.stream_tokens, sizes)
            kept[kinds.LOSS] = spec.head.kept_bytes(sizes)
        else:
            kept[kinds.BETWEEN] += self._stream
        if spec.dropout:
            kept[kinds.OTHER] += 8 * sizes.stream_tokens  # where each token's random stream starts
        recomputed = [i for i in chunk.layers if self._levels[i] != "none"]
        kept[kinds.OTHER] += report_bytes(spec, chunk.layers, sizes)
        kept[kinds.OTHER] += row_number_bytes(spec, recomputed, sizes)
        return kept, on_host

    def _of_layer(self, number: int) -> Counter[str]:
        return self.spec.layers[number].kept_bytes(
            self.sizes,
            self._levels[number],
            tiled=self.memory.mlp_tile_size is not None,
            keeps_attention=self.memory.recompute_keeps_attention,
        )

    def _moves(self, number: int) -> bool:
        return self.memory.cpu_offloading and self._levels[number] == "full"

    def _move_to_host(self, number: int, found: Counter[str]) -> int:
        """Bytes that a layer keeps on the host, which are taken out of ``found``."""
        if not self._moves(number):
            return 0
        moved = found.pop("inputs")
        if self.memory.recompute_keeps_attention and self.spec.layers[number].attention is not None:
            moved += found.pop("attention")
        return moved

    def _input_is_kept(self, chunk: Chunk) -> bool:
        """Whether a module keeps the residual stream that enters a chunk."""
        if not chunk.layers:
            return self.spec.norm.keeps_input(self.sizes)
        first = chunk.layers[0]
        if self._levels[first] != "none":
            return not self._moves(first)
        norm = self.spec.layers[first].attention_norm
        return norm is None or norm.keeps_input(self.sizes)

    def _rotations(self) -> list[tuple[str, int]]:
        """The rotations of the model, which layers that rotate alike share, and who keeps them:
        attention, or the caller if no attention of the stage keeps its own."""
        layers = [number for chunk in self.passes.chunks for number in chunk.layers]
        keeping = {
            attention.rotary
            for number in layers
            if (attention := self.spec.layers[number].attention) is not None
            and self._levels[number] == "none"
        }
        attentions = filter(None, (layer.attention for layer in self.spec.layers))
        sizes: dict[RotarySpec | None, int] = {}
        sizes |= {x.rotary: x.rotation_bytes(self.sizes) for x in attentions}
        return [
            (kinds.ATTENTION if rotary in keeping else kinds.OTHER, num_bytes)
            for rotary, num_bytes in sizes.items()
        ]
