"""Reads damaged files within little time and memory: the result is numbers or a one-line error."""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_megatron.cli.refusal import error_line
from cp_megatron.errors import ConfigError

SECONDS = 3.0
"""CPU time that reading one file may take."""
SPACE = 512 << 20
"""Bytes of address space that reading one file may allocate."""
REFUSED = "refused"


@contextmanager
def narrow() -> Iterator[None]:
    """Limits time and memory, so that a size that a file claims cannot be trusted unnoticed."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPACE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - began < SECONDS


def outcome(read: Callable[[], Any]) -> Any:
    """The result of ``read``, or ``REFUSED`` if it refuses. Any other exception is a bug."""
    with narrow():
        try:
            return read()
        except ConfigError as error:
            line = error_line(error, "pretrain.py")
    assert len(line.splitlines()) == 1, line
    return REFUSED


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether names and bits are equal."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8))
        for name in one
    )


def spread(found: Counter[str]) -> None:
    """Checks that enough files were refused for the test to mean something."""
    assert found[REFUSED] > 0.3 * found.total()


class Trap:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)
