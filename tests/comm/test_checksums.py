"""Any flipped bit changes a tensor's checksum, and both ends of a link compare theirs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_megatron.comm.checksums import LinkSums, bit_sum
from tests.ranks import run_ranks

TYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8])


def flip(x: torch.Tensor, element: int, bit: int) -> None:
    x.view(-1)[element : element + 1].view(torch.uint8)[0] ^= 1 << bit


@settings(max_examples=200)
@given(st.data(), TYPES, st.integers(1, 70), st.integers(0, 9))
def test_any_flipped_bit_changes_the_sum(
    data: st.DataObject, dtype: torch.dtype, size: int, offset: int
) -> None:
    x = torch.randn(size + offset).mul(100).to(dtype)[offset:]
    before = bit_sum(x)
    assert bit_sum(x.clone()) == before
    element, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    flip(x, element, bit)
    assert bit_sum(x) != before
    flip(x, element, bit)
    assert bit_sum(x) == before


def test_a_tensor_without_elements_and_one_that_is_not_contiguous() -> None:
    assert bit_sum(torch.empty(0, 3)) == 0
    x = torch.randn(4, 6)
    assert bit_sum(x.t()) == bit_sum(x.t().contiguous())


def exchange(rank: int, world_size: int, heard: list[list[int]]) -> list[int]:
    """Rank 0 sends 1, 2; rank 1 receives ``heard``. Then the same with closed links."""
    world, sums = dist.group.WORLD, LinkSums()
    assert world is not None
    sums.sent(torch.tensor([7]), 1)
    sums.open()
    for number in range(2):
        if rank == 0:
            sums.sent(torch.tensor([number + 1]), 1)
        else:
            sums.received(torch.tensor(heard[number]), 0)
    found = sums.close(world, torch.device("cpu"))
    sums.sent(torch.tensor([7]), 1)
    sums.open()
    assert sums.close(world, torch.device("cpu")) == []
    return found


@pytest.mark.parametrize(
    ("heard", "blamed"), [([[1], [2]], []), ([[1], [3]], [0]), ([[2], [1]], [0])]
)
def test_the_receiver_knows_the_sender_of_a_corrupted_message(
    heard: list[list[int]], blamed: list[int]
) -> None:
    assert run_ranks(exchange, 2, heard) == [[], blamed]
