"""The bits of a tensor: a sum of them that any flipped one changes, and a way to flip one."""

from __future__ import annotations

import torch
from torch import Tensor

# Widest first: the fewer words, the faster the sum.
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@torch.no_grad()
def bit_sum(x: Tensor) -> Tensor:
    """The sum of a tensor's bits as whole numbers, modulo 2**64; int64 [] on its device.

    Equal bits have equal sums, whatever the device and the place in memory. A flipped bit changes
    one word by a power of two below 2**64 and so always the sum; several changes, or two words that
    changed places, might cancel.

    Args:
        x: of any type and shape. One that is not contiguous is copied.
    """
    flat = x.detach().contiguous().view(-1)
    size = flat.numel() * flat.element_size()
    word = next(word for word in _WORDS if size % word.itemsize == 0)
    if flat.data_ptr() % word.itemsize or flat.storage_offset() * x.element_size() % word.itemsize:
        flat = flat.clone()  # a part of a message need not begin where a word does
    return flat.view(torch.uint8).view(word).sum(dtype=torch.int64)


@torch.no_grad()
def flip_bit(x: Tensor, *, element: int = 0, bit: int = 5) -> None:
    """Flips one bit of one element in place.

    Args:
        x: contiguous, of a type of one byte or more.
        element: which, counted flat.
        bit: which of the element's first byte: of a float's, one of little weight.
    """
    flat = x.detach().view(-1)[element : element + 1].view(torch.uint8)
    flat[0] ^= 1 << bit
