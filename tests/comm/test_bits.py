"""Any single flipped bit changes the sum of a tensor's bits."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_megatron.comm.bits import bit_sum, flip_bit

TYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])


@given(st.data(), TYPES, st.integers(1, 70), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_any_flipped_bit_changes_the_sum(
    data: st.DataObject, dtype: torch.dtype, size: int, offset: int
) -> None:
    x = torch.randn(size + offset).mul(100).to(dtype)[offset:]
    before = bit_sum(x)
    assert bit_sum(x.clone()) == before
    element, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    flip_bit(x, element=element, bit=bit)
    assert bit_sum(x) != before
    flip_bit(x, element=element, bit=bit)
    assert bit_sum(x) == before


def test_a_tensor_without_elements_and_one_that_is_not_contiguous() -> None:
    assert bit_sum(torch.empty(0, 3)) == 0
    x = torch.randn(4, 6)
    assert bit_sum(x.t()) == bit_sum(x.t().contiguous())
