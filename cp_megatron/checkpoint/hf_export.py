"""Which tensors an exported Hugging Face folder holds, and which of ours each is made of. No torch.

Llama and its kin have our tensors under other names. GPT-2 has one tensor for queries, keys and
values, and its linear layers multiply from the right, so their weights lie the other way round::

    attention.query.weight [h, h]
    attention.key.weight   [h, h]    ->  [3h, h]  ->  h.0.attn.c_attn.weight [h, 3h]
    attention.value.weight [h, h]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cp_megatron.checkpoint.hf_files import hf_tensors
from cp_megatron.config import ModelConfig
from cp_megatron.families.gpt2 import has_gpt2_shape

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ExportTensor:
    """A tensor of the folder.

    Attributes:
        key: its name there.
        parts: names and shapes here, laid one after the other along their first dim.
        transposed: what they make together is turned round then.
    """

    key: str
    parts: tuple[tuple[str, Shape], ...]
    transposed: bool = False

    @property
    def shape(self) -> Shape:
        """As it lies in the file."""
        rows = sum(shape[0] for _, shape in self.parts)
        shape = (rows, *self.parts[0][1][1:])
        return shape[::-1] if self.transposed else shape


def export_tensors(model: ModelConfig, vocab_size: int, positions: int) -> list[ExportTensor]:
    """Every tensor of a folder, in the order of its file.

    Args:
        model: has an architecture of Hugging Face.
        vocab_size: rows of the embedding there, without padding.
        positions: rows of the table of learned positions, where there is one.
    """
    if has_gpt2_shape(model):
        return list(_gpt2(model, vocab_size, positions))
    tensors = hf_tensors(model, vocab_size)
    return [ExportTensor(key=x.key, parts=((ours, x.shape),)) for ours, x in tensors.items()]


def _gpt2(model: ModelConfig, vocab_size: int, positions: int) -> Iterator[ExportTensor]:
    hidden, ffn = model.hidden_size, model.ffn_size
    table = vocab_size, hidden

    def same(key: str, ours: str, shape: Shape) -> ExportTensor:
        return ExportTensor(key=key, parts=((ours, shape),))

    def norm(key: str, ours: str) -> Iterator[ExportTensor]:
        yield same(f"{key}.weight", f"{ours}.weight", (hidden,))
        yield same(f"{key}.bias", f"{ours}.bias", (hidden,))

    def linear(key: str, ours: list[str], width: int, inputs: int) -> Iterator[ExportTensor]:
        weights = tuple((f"{name}.weight", (width, inputs)) for name in ours)
        yield ExportTensor(key=f"{key}.weight", parts=weights, transposed=True)
        biases = tuple((f"{name}.bias", (width,)) for name in ours)
        yield ExportTensor(key=f"{key}.bias", parts=biases)

    yield same("transformer.wte.weight", "embedding.weight", table)
    yield same("transformer.wpe.weight", "positions.weight", (positions, hidden))
    for layer in range(model.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"layers.{layer}"
        three = [f"{ours}.attention.{name}" for name in ("query", "key", "value")]
        yield from norm(f"{theirs}.ln_1", f"{ours}.attention_norm")
        yield from linear(f"{theirs}.attn.c_attn", three, hidden, hidden)
        yield from linear(f"{theirs}.attn.c_proj", [f"{ours}.attention.out"], hidden, hidden)
        yield from norm(f"{theirs}.ln_2", f"{ours}.mlp_norm")
        yield from linear(f"{theirs}.mlp.c_fc", [f"{ours}.mlp.up"], ffn, hidden)
        yield from linear(f"{theirs}.mlp.c_proj", [f"{ours}.mlp.down"], hidden, ffn)
    yield from norm("transformer.ln_f", "norm")
    if model.untie_embeddings_and_output_weights:
        yield same("lm_head.weight", "head.weight", table)
