"""Counts what the operations of a layer move between memory and processor, on meta tensors.

A GPU runs an operation as one launch that reads its inputs and writes its results. Launches that do
little arithmetic take as long as this traffic.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")

GEMMS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm"})
ATTENTION = frozenset({"_flash_attention_forward", "_flash_attention_backward"})
# These run nothing, like views.
ALLOCATIONS = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
)
OVERWRITING = frozenset({"copy_", "zero_", "fill_"})


class Traffic(TorchDispatchMode):
    """Counts bytes and launches of what runs inside, except matrix products and attention's kernel.

    Attributes:
        num_bytes, launches: by the name of the operation, behind that of the ``part`` if any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes, self.launches = Counter[str](), Counter[str]()
        self._paused, self._part = False, ""

    def total(self, part: str = "") -> int:
        """Bytes of the operations in a part; by default of those in none."""
        names = (name.rpartition("/") for name in self.num_bytes)
        return sum(self.num_bytes["".join(name)] for name in names if name[0] == part)

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name, schema = func.overloadpacket.__name__, func._schema
        # A view has a result that shares its memory with an argument and is not written.
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if self._paused or is_view or name in GEMMS | ATTENTION | ALLOCATIONS:
            return result
        given = zip(schema.arguments, [*args, *([None] * len(schema.arguments))])
        by_name = {argument.name: value for argument, value in given} | (kwargs or {})
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        only_written = [a.name for a in schema.arguments if a.is_out]
        only_written += written[:1] if name in OVERWRITING else []
        read = [value for key, value in by_name.items() if key not in only_written]
        stored = [by_name[key] for key in written] if written else [result]
        self._count(name, [*read, *stored])
        return result

    def fused(
        self,
        function: Callable[..., Result],
        *,
        launches: int = 1,
        scratch: Callable[..., int] = lambda *args: 0,
    ) -> Callable[..., Result]:
        """``function`` as a kernel that reads its arguments and writes its results once.

        Args:
            function: computes the same in any number of operations.
            launches: how many launches the kernel is.
            scratch: of the arguments, the bytes that these launches write and read in between.
        """

        def counted(*args: Any) -> Result:
            with self.paused():
                result = function(*args)
            name = f"{function.__module__.split('.')[-1]}.{function.__name__}"
            unchanged = {id(x) for x in tree_leaves(args)}
            made = [x for x in tree_leaves(result) if id(x) not in unchanged]
            self._count(name, [args, made], launches, scratch(*args))
            return result

        return counted

    def in_part(self, part: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """``function``, whose operations are counted as those of a part."""

        def counted(*args: Any, **options: Any) -> Result:
            before, self._part = self._part, f"{part}/"
            try:
                return function(*args, **options)
            finally:
                self._part = before

        return counted

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing inside is counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _count(self, name: str, moved: object, launches: int = 1, scratch: int = 0) -> None:
        name = self._part + name
        self.num_bytes[name] += scratch + sum(map(_num_bytes, _tensors(moved)))
        self.launches[name] += launches


def _tensors(tree: object) -> Iterable[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def _num_bytes(x: Tensor) -> int:
    """Of the elements in memory: an expanded dim is one element."""
    sizes = zip(x.shape, x.stride())
    return math.prod(size for size, stride in sizes if stride) * x.element_size()
