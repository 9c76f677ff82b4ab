"""Inputs that ranks cannot compute together are an error on every rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel, input_check
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, SequenceLayout
from tests.ranks import run_ranks

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(tokens: int = 8, heads: int = 4, kv_heads: int = 4, dim: int = 8) -> Inputs:
    shape = (1, tokens, heads, dim), (1, tokens, kv_heads, dim), (1, tokens, kv_heads, dim)
    return torch.zeros(shape[0]), torch.zeros(shape[1]), torch.zeros(shape[2])


def too_short(x: Inputs) -> Inputs:
    return x[0][:, 1:], x[1][:, 1:], x[2][:, 1:]


def strided(x: Inputs) -> Inputs:
    return torch.zeros(1, 4, 8, 8).transpose(1, 2), x[1], x[2]


def mixed(x: Inputs) -> Inputs:
    return x[0], x[1].double(), x[2]


def elsewhere(x: Inputs) -> Inputs:
    return x[0], x[1], x[2].to("meta")


def bigger_batch(x: Inputs) -> Inputs:
    return x[0].repeat(2, 1, 1, 1), x[1].repeat(2, 1, 1, 1), x[2].repeat(2, 1, 1, 1)


def other_type(x: Inputs) -> Inputs:
    return x[0].double(), x[1].double(), x[2].double()


ONE_RANK: dict[str, tuple[Callable[[Inputs], Inputs], str]] = {
    "too short": (too_short, "tokens must be this rank's 8 of 16"),
    "strided": (strided, "must be contiguous (works: q.contiguous())"),
    "mixed types": (mixed, "must be one type"),
    "mixed devices": (elsewhere, "must be on one device"),
    "bigger batch": (bigger_batch, "differs from what rank"),
    "other type": (other_type, "differs from what rank"),
}


def refused(rank: int, world_size: int, change: Callable[[Inputs], Inputs], odd: int) -> str:
    """The error of this rank if only rank ``odd`` changes its inputs."""
    cp = ContextParallel(dist.group.WORLD, Mask.causal(8 * world_size))
    x = inputs()
    try:
        cp.attention(*(change(x) if rank == odd else x))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ONE_RANK)
@pytest.mark.parametrize("odd", [0, 1])
def test_one_rank_with_wrong_inputs_stops_all(name: str, odd: int) -> None:
    change, message = ONE_RANK[name]
    results = run_ranks(refused, 2, change, odd)
    assert message in results[odd]
    both = "differs" in message
    assert (message if both else f"is refused by rank {odd} of the group") in results[1 - odd]


MASKS: dict[str, tuple[Mask, Mask]] = {
    "documents": (Mask.documents([3, 13]), Mask.documents([4, 12])),
    "length": (Mask.causal(16), Mask.causal(32)),
    "window": (Mask.causal(16, window=(3, 0)), Mask.causal(16, window=(4, 0))),
    "kind": (Mask.causal(16), Mask.full(16)),
}


def differing(rank: int, world_size: int, masks: tuple[Mask, Mask], check: bool) -> str:
    cp = ContextParallel(dist.group.WORLD, masks[rank], check_ranks=check)
    try:
        cp.attention(*inputs(cp.layout.shard_len))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_differ_are_an_error_on_every_rank(name: str) -> None:
    results = run_ranks(differing, 2, MASKS[name], True)
    for rank, result in enumerate(results):
        assert result.startswith("mask")
        assert f"differs from what rank {1 - rank} of the group has" in result


def messages(rank: int, world_size: int, check: bool | str) -> list[int]:
    """Collectives per call: the first, the same again, another batch size, another mask."""
    seen = 0
    original = input_check.start_all_gather

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        return original(*args, **options)

    input_check.start_all_gather = counting
    counts = []
    try:
        cp = ContextParallel(dist.group.WORLD, Mask.causal(16), check_ranks=check)
        other = cp.with_mask(Mask.documents([5, 11]))
        for engine, x in (
            (cp, inputs()),
            (cp, inputs()),
            (cp, bigger_batch(inputs())),
            (other, inputs()),
        ):
            before = seen
            engine.attention(*x)
            counts.append(seen - before)
    finally:
        input_check.start_all_gather = original
    return counts


def test_one_message_per_call_or_per_mask_and_shape_or_none() -> None:
    assert run_ranks(messages, 2, True) == [[1, 1, 1, 1]] * 2
    assert run_ranks(messages, 2, "once") == [[1, 0, 1, 1]] * 2
    assert run_ranks(messages, 2, False) == [[0, 0, 0, 0]] * 2
    with pytest.raises(ConfigError, match="is not a mode of the check"):
        ContextParallel(None, Mask.causal(8), check_ranks="sometimes")


def later(rank: int, world_size: int, name: str) -> str:
    """One correct attention, then one that is wrong on rank 1."""
    cp = ContextParallel(dist.group.WORLD, Mask.causal(16))
    cp.attention(*inputs())
    if rank == 1 and name == "another mask":
        cp = cp.with_mask(Mask.causal(16, window=(3, 0)))
    try:
        cp.attention(*(strided(inputs()) if rank == 1 and name == "strided" else inputs()))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["strided", "another mask"])
def test_a_rank_that_goes_wrong_later_stops_all(name: str) -> None:
    zero, one = run_ranks(later, 2, name)
    if name == "strided":
        assert "is refused by rank 1" in zero
        assert "must be contiguous" in one
    else:
        assert zero.startswith("mask causal of 16 tokens, window (-1, 0)")
        assert "differs from what rank" in one


def no_width(x: Inputs) -> Inputs:
    return torch.zeros(1, 8, 4, 0), torch.zeros(1, 8, 4, 0), x[2]


def test_any_exception_on_one_rank_stops_the_others_too() -> None:
    zero, one = run_ranks(refused, 2, no_width, 1)
    assert "is refused by rank 1" in zero
    assert "must not be empty" in one


LAYOUTS = {
    "descending": (((4, 6), (0, 2)), ((2, 4), (6, 8))),
    "twice": (((0, 4),), ((0, 4),)),
    "unequal": (((0, 3),), ((3, 8),)),
    "too short": (((0, 3),), ((3, 6),)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_does_not_hold_the_row_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must hold each of 8 positions once"):
        SequenceLayout(LAYOUTS[name], "own").check(8)


def test_a_layout_for_another_group_is_refused() -> None:
    layout = SequenceLayout.make(Mask.causal(8), 2, "zigzag")
    with pytest.raises(ConfigError, match="must be for the group's 1 ranks"):
        ContextParallel(None, Mask.causal(8), layout)


def with_layout(rank: int, world_size: int, swapped: bool) -> str:
    chunks = (((0, 8),), ((8, 16),))
    layout = SequenceLayout(chunks[::-1] if swapped and rank else chunks, "own")
    cp = ContextParallel(dist.group.WORLD, Mask.causal(16), layout)
    try:
        cp.attention(*inputs())
    except ConfigError as error:
        return str(error)
    return ""


def test_layouts_that_differ_are_an_error_on_every_rank() -> None:
    assert run_ranks(with_layout, 2, False) == ["", ""]
    assert all("differs from what rank" in result for result in run_ranks(with_layout, 2, True))


@pytest.mark.parametrize(
    ("options", "heads", "message"),
    [
        ({"exchange": "a2a"}, (1, 1), "shares 1 query heads among 2 ranks"),
        ({"exchange": "a2a"}, (3, 3), "--cp-comm-type a2a: shares 3 query heads"),
    ],
)
def test_too_few_heads_are_an_error_on_every_rank(
    options: dict[str, Any], heads: tuple[int, int], message: str
) -> None:
    for result in run_ranks(with_heads, 2, options, heads):
        assert message in result


def with_heads(rank: int, world_size: int, options: dict[str, Any], heads: tuple[int, int]) -> str:
    cp = ContextParallel(dist.group.WORLD, Mask.causal(16), **options)
    try:
        cp.attention(*inputs(8, *heads))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": "a2a+p2p"}, "a2a+p2p needs two sizes"),
        ({"exchange": "a2a+p2p", "hierarchical_sizes": (2, 2)}, "whose product is"),
        ({"exchange": "p2p", "hierarchical_sizes": (1, 1)}, "belongs to a2a+p2p"),
        ({"exchange": "mail"}, "is not an exchange"),
        ({"route": "scenic"}, "is not a route"),
        ({"layout": "spiral"}, "is not a layout"),
        ({"exchange": "a2a+p2p", "hierarchical_sizes": [1, 1.0]}, "whose product is"),
    ],
)
def test_names_and_sizes_are_refused_when_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ContextParallel(None, Mask.causal(16), **options)
