"""The interface of a Hugging Face family: config.json and the names of its tensors, both ways.

The names are a table of modules, in the order in which the folder stores them. A row may join
several modules of ours in one tensor of the folder, and the folder may store a weight transposed,
as GPT-2 does::

    layers.0.attention.query.weight [h, h]
    layers.0.attention.key.weight   [h, h]  ->  [3h, h]  ->  h.0.attn.c_attn.weight [h, 3h]
    layers.0.attention.value.weight [h, h]

Or the folder may store each row of a weight of ours as a tensor, as StableLM does with the norms
of its heads (n heads, d channels)::

                                              self_attn.q_layernorm.norms.0.weight [d]
    layers.0.attention.query_norm.weight [n, d]  ->  ...
                                              self_attn.q_layernorm.norms.{n - 1}.weight [d]

Or it may join the rows of several modules head by head, as Qwen3-Next does with attention's queries
and their gates (d channels)::

    layers.3.attention.query.weight [n d, h]  ->  query of head 0 [d, h], gate of head 0 [d, h],
    layers.3.attention.gate.weight  [n d, h]      query of head 1 [d, h], ... in q_proj.weight

Weights of experts are stacked here. A folder has a tensor for each expert, or stacks them as well,
then possibly gate and up in one tensor, transposed, and with alternating columns (E experts)::

    layers.0.mlp.experts.gate [E, f, h]  ->  mlp.experts.{0 ... E - 1}.gate_proj.weight [f, h]

    layers.0.mlp.experts.gate [E, f, h]  ->  mlp.experts.gate_up_proj [E, 2f, h]
    layers.0.mlp.experts.up   [E, f, h]      or [E, h, 2f]

Shapes are not part of the table: they follow from the description of the model (``ModelSpec``).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, NamedTuple

from cp_megatron.config import ModelConfig
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.spec import ModelSpec


class Part(NamedTuple):
    """A parameter of ours, or some of its rows, inside a tensor of the folder.

    Attributes:
        name: the parameter's name.
        shape: the shape of the part, without the rows that pad the vocabulary.
        padded: whether our parameter has such rows.
        start: the part's first row in the parameter.
        stacked: as in ``ParameterSpec``.
        is_buffer: it is not a parameter, but a buffer.
    """

    name: str
    shape: tuple[int, ...]
    padded: bool
    start: int = 0
    stacked: bool = False
    is_buffer: bool = False

    def group(self, number: int, count: int) -> Part:
        """One of ``count`` equal groups of the rows, numbered from 0."""
        rows = self.shape[0] // count
        return self._replace(shape=(rows, *self.shape[1:]), start=self.start + number * rows)


@dataclass(frozen=True, kw_only=True)
class HFTensor:
    """A tensor of a Hugging Face folder.

    Attributes:
        key: its name in the folder.
        parts: our parameters, concatenated along their first dim, or their second if they are
            stacked.
        transposed: whether the folder stores the transpose of that concatenation, of its last two
            dims.
        is_row: the only part is one row, which the folder stores without its first dim.
        interleaved: whether the parts alternate element by element instead.
    """

    key: str
    parts: tuple[Part, ...]
    transposed: bool = False
    is_row: bool = False
    interleaved: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the folder."""
        if self.is_row:
            return self.parts[0].shape[1:]
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        if self.transposed:
            shape[-2:] = shape[:-3:-1]
        return tuple(shape)

    @property
    def dim(self) -> int:
        """The dim of the concatenation along which the parts are joined."""
        return 1 if self.parts[0].stacked and not self.is_row else 0

    @property
    def is_exact(self) -> bool:
        """Whether the folder stores it in float32 or more, as buffers are."""
        return self.parts[0].is_buffer

    def place(self, number: int) -> slice:
        """Where a part, by its number, lies in ``dim`` of the concatenation."""
        if self.interleaved:
            return slice(number, None, len(self.parts))
        start = sum(part.shape[self.dim] for part in self.parts[:number])
        return slice(start, start + self.parts[number].shape[self.dim], 1)


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
            by spaces. ``{}`` stands for the number of the layer, and a second ``{}`` in the name of
            the folder's module for the row of our parameter that it holds. Modules that a model
            does not have are skipped. A parameter of a module that has parts, such as
            ``attention.sinks``, belongs to the row of that module, unless a row names the parameter
            itself (or a buffer) beside the tensor that holds it. Where names depend on the model,
            this is a function of it.
        other_names: rows that some folders have instead of those of ``modules`` that hold the same.
        defaults: the values of keys that config.json leaves out, where transformers' class of the
            family has another default than ``read`` would take. A key that is null is not left out.
        transposed: last parts of the names of modules whose weight the folder stores transposed, or
            of rows that name parameters.
        interleaved: last parts of the names of tensors whose parts alternate.
        grouped: last parts of the names of modules that join the rows of ours group by group, and
            the number of groups in a model.
        heads_divide_hidden_size: whether transformers refuses a model whose number of heads does
            not divide its hidden size.
        classes: other classes of transformers that a config.json of this ``model_type`` may name.
        container: a class of transformers that reads images too, and holds a model of the family:
            its config.json has the model's entries in ``text_config``.
        base_prefix: a prefix of names that folders of the class without the output layer leave out.
        buffers: a regular expression for the names of the buffers that old folders hold. They are
            ignored, because they follow from the flags.
    """

    model_type: str
    architecture: str
    read: Callable[[JsonFields], ModelConfig]
    write: Callable[[ModelConfig, int], dict[str, Any]]
    modules: Mapping[str, str] | Callable[[ModelConfig], Mapping[str, str]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    interleaved: frozenset[str] = frozenset()
    grouped: Mapping[str, Callable[[ModelConfig], int]] = field(default_factory=dict)
    heads_divide_hidden_size: bool = False
    classes: tuple[str, ...] = ()
    container: str = ""
    base_prefix: str = ""
    buffers: str = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

    def tensors(
        self, model: ModelConfig, *, vocab_size: int, seq_length: int, other: bool = False
    ) -> list[HFTensor]:
        """Lists the tensors of a folder in their order.

        Args:
            model: a model of this family.
            vocab_size: rows of the embedding in the folder, which has no padding.
            seq_length: as in ``ModelSpec.of``.
            other: the folder has ``other_names``.

        Raises:
            AssertionError: the table of modules does not name every parameter exactly once.
        """
        spec = ModelSpec.of(model, vocab_size=vocab_size, seq_length=seq_length)
        parts = _parts(spec)
        leaves: dict[str, list[str]] = defaultdict(list)
        for name in parts:
            module, _, leaf = name.rpartition(".")
            leaves[module].append(leaf)
        table = self._table(model, other=other)
        listed = {name for ours in table.values() for name in ours.split()}
        tensors: list[HFTensor] = []
        for per_layer, rows_of_table in groupby(table.items(), lambda row: "{}" in row[0]):
            block = list(rows_of_table)
            for layer in range(model.num_layers if per_layer else 1):
                for theirs, row in block:
                    names = row.replace("{}", str(layer)).split()
                    key, first = theirs.replace("{}", str(layer), 1), row.split()[0]
                    ends = [f".{x}" for x in leaves[names[0]] if f"{first}.{x}" not in listed]
                    for end in [""] if names[0] in parts else ends:
                        joined = tuple(parts[f"{name}{end}"] for name in names)
                        tensors += self._stored(theirs, f"{key}{end}", joined, model)
        named = Counter[str]()
        for part in (part for tensor in tensors for part in tensor.parts):
            named[part.name] += math.prod(part.shape)
        expected = {name: math.prod(part.shape) for name, part in parts.items()}
        assert named == expected, f"{self.model_type} names every parameter once"
        return tensors

    def _table(self, model: ModelConfig, *, other: bool) -> Mapping[str, str]:
        """The rows of a folder with the usual names, or with the others."""
        table = self.modules(model) if callable(self.modules) else self.modules
        if not other:
            return table
        held = {name for ours in self.other_names.values() for name in ours.split()}
        kept = {theirs: ours for theirs, ours in table.items() if not held & set(ours.split())}
        return {**kept, **self.other_names}

    def _stored(
        self, theirs: str, key: str, parts: tuple[Part, ...], model: ModelConfig
    ) -> Iterator[HFTensor]:
        """The tensors that hold the parts, one or one for each row; ``theirs`` names their row."""
        last = theirs.rpartition(".")[2]
        flips = last in self.transposed and not key.endswith(".bias")
        num_groups = self.grouped.get(last, lambda _: 1)(model)
        if num_groups > 1:
            parts = tuple(
                part.group(number, num_groups) for number in range(num_groups) for part in parts
            )
        if "{}" not in key:
            alternates = last in self.interleaved
            yield HFTensor(key=key, parts=parts, transposed=flips, interleaved=alternates)
            return
        (whole,) = parts
        for row in range(whole.shape[0]):
            part = whole._replace(shape=(1, *whole.shape[1:]), start=row)
            yield HFTensor(key=key.format(row), parts=(part,), is_row=True)


def _parts(spec: ModelSpec) -> dict[str, Part]:
    """Whole parameters and buffers by their names."""
    parts: dict[str, Part] = {}
    buffers = {buffer.name for buffer in spec.buffers()}
    for each in chain(spec.parameters(), spec.buffers()):
        shape = (each.rows or each.shape[0], *each.shape[1:])
        parts[each.name] = Part(
            each.name,
            shape,
            padded=each.rows is not None,
            stacked=each.stacked,
            is_buffer=each.name in buffers,
        )
    return parts
