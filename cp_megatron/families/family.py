"""The interface of a Hugging Face family: config.json and the names of its tensors, both ways.

The names are a table of modules, in the order in which the folder stores them. A row may join
several modules of ours in one tensor of the folder, and the folder may store a weight transposed,
as GPT-2 does::

    layers.0.attention.query.weight [h, h]
    layers.0.attention.key.weight   [h, h]  ->  [3h, h]  ->  h.0.attn.c_attn.weight [h, 3h]
    layers.0.attention.value.weight [h, h]

Shapes are not part of the table: they follow from the description of the model (``ModelSpec``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from cp_megatron.config import ModelConfig
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.spec import ModelSpec


class Part(NamedTuple):
    """A parameter of ours as the folder has it: its name, its shape, whether we pad its rows."""

    name: str
    shape: tuple[int, ...]
    padded: bool


@dataclass(frozen=True, kw_only=True)
class HFTensor:
    """A tensor of a Hugging Face folder.

    Attributes:
        key: its name in the folder.
        parts: our parameters, concatenated along their first dim.
        transposed: whether the folder stores the transpose of that concatenation.
    """

    key: str
    parts: tuple[Part, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the folder."""
        rows = sum(part.shape[0] for part in self.parts)
        shape = (rows, *self.parts[0].shape[1:])
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True, kw_only=True)
class Family:
    """A Hugging Face architecture.

    Attributes:
        model_type: its name in config.json, for example ``llama``.
        architecture: its class in transformers, for example ``LlamaForCausalLM``.
        read: makes the flags of a model from config.json. It raises ``fields.wrong`` or
            ``fields.unsupported`` for everything that transformers would compute otherwise.
        write: makes the entries of config.json that are the family's own, from the flags of a model
            and the longest sequence in tokens. It need not check the flags: the export is refused
            if ``read`` does not get a flag back from the entries.
        modules: for each module of the folder, in its order, our modules that it holds, separated
            by spaces. ``{}`` stands for the number of the layer. Modules that a model does not have
            are skipped.
        transposed: last parts of the names of modules whose weight the folder stores transposed.
        heads_divide_hidden_size: transformers refuses a model of which this is not true.
        loads: a run can start from such a folder; otherwise the family is only exported.
    """

    model_type: str
    architecture: str
    read: Callable[[JsonFields], ModelConfig]
    write: Callable[[ModelConfig, int], dict[str, Any]]
    modules: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    heads_divide_hidden_size: bool = False
    loads: bool = True

    def tensors(self, model: ModelConfig, *, vocab_size: int, seq_length: int) -> list[HFTensor]:
        """Lists the tensors of a folder in their order.

        Args:
            model: a model of this family.
            vocab_size: rows of the embedding in the folder, which has no padding.
            seq_length: as in ``ModelSpec.of``.
        """
        spec = ModelSpec.of(model, vocab_size=vocab_size, seq_length=seq_length)
        parts: dict[str, dict[str, Part]] = defaultdict(dict)
        for parameter in spec.parameters():
            module, _, leaf = parameter.name.rpartition(".")
            shape = (parameter.rows or parameter.shape[0], *parameter.shape[1:])
            parts[module][leaf] = Part(parameter.name, shape, padded=parameter.rows is not None)
        tensors: list[HFTensor] = []
        for per_layer, rows_of_table in groupby(self.modules.items(), lambda row: "{}" in row[0]):
            block = list(rows_of_table)
            for layer in range(model.num_layers if per_layer else 1):
                for theirs, ours in block:
                    names = ours.replace("{}", str(layer)).split()
                    tensors += self._module(theirs.format(layer), [parts[name] for name in names])
        named = sum(len(tensor.parts) for tensor in tensors)
        assert named == sum(map(len, parts.values())), f"{self.model_type} names every parameter"
        return tensors

    def _module(self, theirs: str, ours: list[dict[str, Part]]) -> Iterator[HFTensor]:
        transposed = theirs.rpartition(".")[2] in self.transposed
        for leaf in ours[0]:
            parts, flips = tuple(module[leaf] for module in ours), transposed and leaf == "weight"
            yield HFTensor(key=f"{theirs}.{leaf}", parts=parts, transposed=flips)
