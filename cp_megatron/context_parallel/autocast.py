"""Casts the inputs of attention as ``torch.autocast`` does."""

from __future__ import annotations

import torch
from torch import Tensor


def cast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts the inputs as autocast casts those of PyTorch's ``scaled_dot_product_attention``.

    Under autocast a rotary embedding computed in float32 gives queries and keys in float32 beside
    values in bfloat16. Attention then runs in autocast's type; the gradients come back in the types
    of the inputs. As in PyTorch, float64 stays, and without autocast everything does.
    """
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )
