"""One parameter, and the base class of everything that has parameters.

A block is a tree: it has parts, and the leaves have parameters. The names of parts are the names
of submodules, so the path to a parameter is its name in the model's ``state_dict``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from cp_megatron.errors import ConfigError

Init = Literal["normal", "scaled_normal", "ones", "zeros", "convolution", "decay"]
"""``scaled_normal`` divides the standard deviation by sqrt(2 x layers). It is meant for matrices
whose output is added to the residual stream (Radford et al. 2019). ``convolution`` is uniform
within 1 / sqrt(width), as in ``torch.nn.Conv1d``, and ``decay`` the logarithm of a number that is
uniform in [0.01, 16), as in Qwen3-Next."""
Activations = Literal["residual", "heads"]


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """One parameter: its name, its global shape, how ranks share it and how it starts.

    Attributes:
        name: dotted, relative to the block that was asked (``query.weight``).
        shape: the global shape; the first dim is the output.
        init: the distribution of the initial values.
        split: for each mesh axis that splits the parameter, by name, the dim that it splits.
        units: number of indivisible parts of the split dim, such as heads; None allows any
            division.
        shares_units: several ranks may share a unit. An axis that has more ranks than units then
            does not split the parameter: each rank holds all of it and computes with one unit.
        used_on: what ranks that hold the parameter whole compute with it: the residual stream,
            which differs over the ranks of an axis only if that axis splits the sequence, or
            heads, which always differ.
        stacked: dim 0 counts matrices (or vectors) of one kind, such as experts. Each is drawn by
            its own number, and ``decays`` looks at one of them. Tokens of all ranks of ``tp`` meet
            at its owner, so that no gradient is a summand over tp.
        rows: number of rows that are drawn at random; the rows after them (the padding of the
            vocabulary) are zero. None: all.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    split: Mapping[str, int] = field(default_factory=dict)
    units: int | None = None
    shares_units: bool = False
    used_on: Activations = "residual"
    stacked: bool = False
    rows: int | None = None

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices and embeddings, not to vectors."""
        return len(self.shape) > (2 if self.stacked else 1)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def split_dim(self, axis: str, size: int) -> int | None:
        """The dim that ``size`` ranks of ``axis`` split; None: each of them holds all of it."""
        if axis not in self.split or (self.shares_units and (self.units or 1) % size):
            return None
        return self.split[axis]

    def is_partial(self, axis: str, size: int, *, splits_sequence: bool) -> bool:
        """Whether the gradient that a rank of ``axis`` computes is only a summand of the true one.

        This is so if the parameter is replicated over the axis, but used on activations that
        differ over it. With ``splits_sequence``, the residual stream does.
        """
        if size == 1 or self.stacked or self.split_dim(axis, size) is not None:
            return False
        return axis in self.split or self.used_on == "heads" or splits_sequence

    def local_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one rank's part on mesh axes of these sizes."""
        shape = list(self.shape)
        for axis, size in sizes.items():
            dim = self.split_dim(axis, size)
            if dim is not None:
                shape[dim] //= size
        return tuple(shape)

    def shard_dim(self, num_ranks: int) -> int:
        """The dim that FSDP divides among ``num_ranks``.

        Dim 0 may be divided unevenly, but the experts of a rank can be fewer than the ranks.
        """
        return 1 if self.stacked and self.shape[1] % num_ranks == 0 else 0

    def check_split(self, axis: str, size: int) -> None:
        """Checks that ``size`` ranks of ``axis`` can share the parameter.

        Raises:
            ConfigError: its units or its width cannot be divided.
        """
        if axis not in self.split:
            return
        width = self.units or self.shape[self.split[axis]]
        if width % size and not (self.shares_units and size % width == 0):
            rule = f"must divide {width}, the number of {'heads' if self.units else 'rows'}"
            raise ConfigError(f"{axis} size", size, f"{rule} of {self.name}", f"1, {width}")


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """Base class of the descriptions of a model's blocks.

    Fields that hold a block (or a tuple of blocks) are its parts. They are named as the modules
    are, and stand in the order of the modules.
    """

    def parts(self) -> Iterator[tuple[str, BlockSpec]]:
        """The blocks that this block consists of, with the names of their modules, in order."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, BlockSpec):
                yield each.name, value
            elif isinstance(value, tuple):
                blocks = enumerate(value)
                yield from ((f"{each.name}.{i}", x) for i, x in blocks if isinstance(x, BlockSpec))

    def own_parameters(self) -> Iterator[ParameterSpec]:
        """The parameters that belong to no part."""
        yield from ()

    def parameters(self) -> Iterator[ParameterSpec]:
        """All parameters in the order of the modules, with names relative to this block."""
        yield from self.own_parameters()
        for name, part in self.parts():
            for parameter in part.parameters():
                yield replace(parameter, name=f"{name}.{parameter.name}")

    def own_buffers(self) -> Iterator[ParameterSpec]:
        """Tensors of this block itself that are stored with the parameters but not trained."""
        yield from ()

    def buffers(self) -> Iterator[ParameterSpec]:
        """All of them, with names relative to this block."""
        yield from self.own_buffers()
        for name, part in self.parts():
            for buffer in part.buffers():
                yield replace(buffer, name=f"{name}.{buffer.name}")

    def matmul_parameters(self) -> int:
        """Number of elements of the matrices that every token is multiplied with, which is the
        number of its multiply-adds."""
        return sum(part.matmul_parameters() for _, part in self.parts())

    def pair_channels(self) -> int:
        """Multiply-adds of one attended pair of a query and a key, in both products together.

        Each product is computed once in forward and twice in backward.
        """
        return sum(part.pair_channels() for _, part in self.parts())

    def training_flops(self, *, num_tokens: float, num_pairs: float) -> float:
        """Forward and backward FLOPs; recomputation is not counted.

        These are 6 per matrix parameter and token (Kaplan et al. 2020, arXiv:2001.08361, table 1)
        and those of the attended pairs.

        Args:
            num_tokens: tokens trained on.
            num_pairs: attended pairs of a query and a key, over all rows; the mean of the layers
                that attend.
        """
        return 6.0 * (self.matmul_parameters() * num_tokens + num_pairs * self.pair_channels())
