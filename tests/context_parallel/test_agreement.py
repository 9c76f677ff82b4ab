"""What ranks can not compute together is an error on every one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask
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


def refused(rank: int, world_size: int, spoil: Callable[[Inputs], Inputs], odd: int) -> str:
    """The error of this rank when only rank ``odd`` gives spoilt inputs."""
    cp = ContextParallel(dist.group.WORLD, Mask.causal(8 * world_size))
    x = inputs()
    try:
        cp.attention(*(spoil(x) if rank == odd else x))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ONE_RANK)
@pytest.mark.parametrize("odd", [0, 1])
def test_one_rank_with_wrong_inputs_stops_all(name: str, odd: int) -> None:
    spoil, message = ONE_RANK[name]
    results = run_ranks(refused, 2, spoil, odd)
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


def messages(rank: int, world_size: int, check: bool) -> list[int]:
    """Collectives per call: the first, the same again, another batch size, another mask."""
    seen = 0
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    import cp_megatron.context_parallel.agreement as agreement

    original: Any = agreement._all_gather

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        return original(*args, **options)

    assert original is getattr(dist, name)
    agreement._all_gather = counting
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
        agreement._all_gather = original
    return counts


def test_one_message_per_mask_and_shape_or_none() -> None:
    assert run_ranks(messages, 2, True) == [[1, 0, 1, 1]] * 2
    assert run_ranks(messages, 2, False) == [[0, 0, 0, 0]] * 2


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
        ({"exchange": "mail"}, "is no exchange"),
        ({"route": "scenic"}, "is no route"),
        ({"layout": "spiral"}, "is no layout"),
    ],
)
def test_names_and_sizes_are_refused_when_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ContextParallel(None, Mask.causal(16), **options)
