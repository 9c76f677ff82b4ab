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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from cp_megatron.config import ModelConfig
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.spec import ModelSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class HFTensor:
    """A tensor of a Hugging Face folder.

    Attributes:
        key: Its name in the folder.
        parts: Names and shapes of our parameters, concatenated along their first dim.
        transposed: Whether the folder stores the transpose of that concatenation.
    """

    key: str
    parts: tuple[tuple[str, Shape], ...]
    transposed: bool = False

    @property
    def shape(self) -> Shape:
        """The shape in the folder."""
        rows = sum(shape[0] for _, shape in self.parts)
        shape = (rows, *self.parts[0][1][1:])
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True, kw_only=True)
class Family:
    """A Hugging Face architecture.

    Attributes:
        model_type: Its name in config.json, for example ``llama``.
        architecture: Its class in transformers, for example ``LlamaForCausalLM``.
        read: Makes the flags of a model from config.json. It raises ``fields.wrong`` or
            ``fields.unsupported`` for whatever this program would not compute as transformers does.
        write: Makes the entries of config.json from the flags of a model and the longest sequence
            in tokens. It need not check the flags: a flag that ``read`` does not get back from the
            entries is refused when a checkpoint is exported.
        modules: Names of modules in the folder, and the names of ours that each one holds,
            separated by spaces. ``{}`` stands for the number of the layer. Modules that a model
            does not have are skipped.
        transposed: Last parts of the names of modules whose weight the folder stores transposed.
        heads_divide_hidden_size: Whether transformers refuses the model otherwise.
        loads: Whether a run can start from such a folder; otherwise it is only written.
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
            model: A model of this family.
            vocab_size: Rows of the embedding in the folder, without our padding.
            seq_length: As in ``ModelSpec.of``.
        """
        spec = ModelSpec.of(model, vocab_size=vocab_size, seq_length=seq_length)
        shapes: dict[str, dict[str, Shape]] = defaultdict(dict)
        for parameter in spec.parameters():
            module, _, leaf = parameter.name.rpartition(".")
            shapes[module][leaf] = parameter.shape
        tensors: list[HFTensor] = []
        for per_layer, rows in groupby(self.modules.items(), key=lambda row: "{}" in row[0]):
            block = list(rows)
            for layer in range(model.num_layers if per_layer else 1):
                for theirs, ours in block:
                    names = ours.replace("{}", str(layer)).split()
                    tensors += self._module(theirs.format(layer), names, shapes)
        named = sum(len(tensor.parts) for tensor in tensors)
        assert named == sum(map(len, shapes.values())), f"{self.model_type} names every parameter"
        return tensors

    def _module(
        self, theirs: str, ours: list[str], shapes: Mapping[str, Mapping[str, Shape]]
    ) -> list[HFTensor]:
        turned = theirs.rpartition(".")[2] in self.transposed
        return [
            HFTensor(
                key=f"{theirs}.{leaf}",
                parts=tuple((f"{name}.{leaf}", shapes[name][leaf]) for name in ours),
                transposed=turned and leaf == "weight",
            )
            for leaf in shapes.get(ours[0], ())
        ]
