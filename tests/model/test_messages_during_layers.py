"""On CPUs, weights and gradients travel while layers are computed.

The events of a step are the work of layers and the ends of messages, in their order.
"""

from __future__ import annotations

from datetime import timedelta
from unittest import mock

import pytest
from torch import nn

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.host_collectives import HostWork
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.model import Transformer, build_model
from cp_megatron.plan import Grid, Mask
from tests.model.grids import LLAMA as MODEL
from tests.model.grids import SEQ, VOCAB, batch, full, no_warnings, run_config
from tests.ranks import run_ranks


def watch(model: Transformer, events: list[str]) -> None:
    """Notes when the MLP of each layer is computed, forward and backward."""
    for number, layer in model.layers.items():
        mlp = layer.mlp
        assert isinstance(mlp, nn.Module)
        mlp.register_forward_hook(lambda *_, n=number: events.append(f"forward {n}"))
        mlp.register_full_backward_hook(lambda *_, n=number: events.append(f"backward {n}"))


def two_backward_passes(
    rank: int, world_size: int, replicas: int, frozen: bool = False
) -> tuple[list[str], list[str], float]:
    """The events of a step, those of a second backward pass, and how far its sums are from twice
    the first ones."""
    grid = Grid(dp=replicas, cp=2, tp=1, replicas=replicas)
    groups = ParallelGroups.create(grid, "cpu")
    model = build_model(run_config(MODEL), groups, vocab_size=VOCAB, dtype="float64", device="cpu")
    model.head.requires_grad_(not frozen)
    events, found = list[str](), list[list[str]]()
    watch(model, events)
    plain = HostWork.wait

    def wait(work: HostWork, timeout: timedelta | None = None) -> bool:
        if work._works:
            events.append(work._name)
        return plain(work, timeout)

    cp = ContextParallel(groups.cp, Mask.causal(SEQ), exchange="p2p", check_ranks="never")
    tokens, gradients = cp.shard(batch()[0], 1), []
    with no_warnings(), mock.patch.object(HostWork, "wait", wait):
        for _ in range(2):
            model(tokens, cp=cp).square().sum().backward()
            trained = [x for x in model.parameters() if x.requires_grad]
            gradients.append([full(x.grad).clone() for x in trained])
            found.append([*events])
            events.clear()
    once, twice = gradients
    apart = max(float((y - 2 * x).abs().max()) for x, y in zip(once, twice, strict=True))
    return found[0], found[1], apart


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rank_waits_after_the_next_layer(replicas: int) -> None:
    for events, again, apart in run_ranks(two_backward_passes, 2 * replicas, replicas):
        # The root's weights and those of layer 0 come first, those of layer 1 during layer 0.
        assert events[: events.index("forward 0")] == ["a gather"] * 2
        # The head's gradients are complete before layer 0's are computed, those of layer 1 after.
        # Replicas add up the results at once, and so does a second pass.
        early = [x[: x.index("backward 0")].count("a sum") for x in (events, again)]
        assert early == ([1, 2] if replicas == 1 else [2, 2])
        assert events.count("a sum") == again.count("a sum") == 4
        assert apart < 1e-12


def test_gradients_are_added_up_beside_a_frozen_head() -> None:
    """The head shares a unit with the norm before it, whose gradients are whole before they are
    added to those of an earlier pass."""
    for _, _, apart in run_ranks(two_backward_passes, 2, 1, True):
        assert apart < 1e-12
