"""Tests column and row parallel linears against torch's own on the whole weight, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial
from torch.utils._python_dispatch import TorchDispatchMode

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.spec import LinearSpec, ParameterSpec
from cp_megatron.tensor_parallel import (
    ColumnParallelLinear,
    Entered,
    RowParallelLinear,
    SpecifiedModule,
    TensorParallel,
    local_weight,
    named_specs,
    place,
    products,
)
from cp_megatron.tensor_parallel import linear as linear
from tests.ranks import run_ranks

TOLERANCE = {"atol": 1e-12, "rtol": 1e-12}
IN, FFN, OUT, SEQ = 6, 8, 5, 4
COLUMN = LinearSpec(inputs=IN, outputs=FFN, bias=True)
ROW = LinearSpec(inputs=FFN, outputs=OUT, bias=True, split="row")


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def placed(module: SpecifiedModule, world_size: int, *seeds: int) -> SpecifiedModule:
    """The module with its parameters drawn from ``seeds`` and spread over the ranks."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for seed, (owner, name, spec) in zip(seeds, list(named_specs(module)), strict=True):
        value = numbers(seed, *spec.shape)
        owner.register_parameter(name, torch.nn.Parameter(place(value, spec, mesh, "cpu")))
    return module


def whole_gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every gradient as a whole tensor; summands are summed."""
    return {
        name: p.grad.redistribute(placements=p.placements).full_tensor()
        for name, p in module.named_parameters()
        if isinstance(p, DTensor) and isinstance(p.grad, DTensor)
    }


def tensor_parallel(sequence_parallel: bool) -> TensorParallel:
    return TensorParallel(group=torch.distributed.group.WORLD, sequence_parallel=sequence_parallel)


def gathered_cross_entropy(logits: Tensor, labels: Tensor, group: ProcessGroup) -> Tensor:
    """Torch's cross-entropy of whole logits; each rank differentiates its own part [.., v/tp]."""
    parts = list(all_gather_dim(logits.detach(), -1, group).chunk(group.size(), -1))
    parts[group.rank()] = logits
    whole = torch.cat(parts, -1).flatten(0, -2)
    exact = whole.to(torch.promote_types(whole.dtype, torch.float32))
    return F.cross_entropy(exact, labels.flatten(), reduction="none").view(labels.shape)


def two_layers(
    rank: int, world_size: int, sequence_parallel: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """row(column(x)): (output, gradient of x, gradients), with x and the output made whole."""
    tp = tensor_parallel(sequence_parallel)
    column, row = ColumnParallelLinear(COLUMN, tp=tp), RowParallelLinear(ROW, tp=tp)
    placed(column, world_size, 1, 2)
    placed(row, world_size, 3, 4)
    # dim 1 is the sequence, of which each rank holds a part with sequence parallelism
    shares = world_size if sequence_parallel else 1
    x = numbers(0, 1, SEQ, IN).chunk(shares, 1)[rank % shares].clone().requires_grad_()
    out = tp.leave(row(column(tp.enter(x))), row.local_bias())
    (out * numbers(5, 1, SEQ, OUT).chunk(shares, 1)[rank % shares]).sum().backward()
    assert x.grad is not None
    whole = [out.detach(), x.grad]
    if sequence_parallel:
        whole = [all_gather_dim(part, 1, tp.group) for part in whole]
    return whole[0], whole[1], whole_gradients(column), whole_gradients(row)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_column_then_row_is_two_plain_layers(world_size: int, sequence_parallel: bool) -> None:
    x = numbers(0, 1, SEQ, IN).requires_grad_()
    shapes = ((FFN, IN), (FFN,), (OUT, FFN), (OUT,))
    weights = [numbers(i + 1, *shape).requires_grad_() for i, shape in enumerate(shapes)]
    expected = F.linear(F.linear(x, *weights[:2]), *weights[2:])
    (expected * numbers(5, 1, SEQ, OUT)).sum().backward()

    for out, grad, column, row in run_ranks(two_layers, world_size, sequence_parallel):
        torch.testing.assert_close(out, expected.detach(), **TOLERANCE)
        torch.testing.assert_close(grad, x.grad, **TOLERANCE)
        actual = [column["weight"], column["bias"], row["weight"], row["bias"]]
        for a, weight in zip(actual, weights, strict=True):
            torch.testing.assert_close(a, weight.grad, **TOLERANCE)


def shared_heads(rank: int, world_size: int) -> tuple[Tensor, dict[str, Tensor], str]:
    """Two heads of width 3 on four ranks: ranks 0, 1 compute the first, ranks 2, 3 the second."""
    spec = LinearSpec(inputs=IN, outputs=6, bias=True, units=2, shares_units=True)
    linear = ColumnParallelLinear(spec, tp=tensor_parallel(False))
    placed(linear, world_size, 1, 2)
    out = linear(numbers(0, 1, SEQ, IN))
    (out * (rank + 1)).sum().backward()
    assert isinstance(linear.weight, DTensor)
    assert isinstance(linear.weight.grad, DTensor)
    return out.detach(), whole_gradients(linear), str(linear.weight.grad.placements)


def test_shared_heads_sum_their_gradients() -> None:
    x, weight, bias = numbers(0, 1, SEQ, IN), numbers(1, 6, IN), numbers(2, 6)
    whole = F.linear(x, weight, bias)
    # the objective weighs rank r's output by r + 1: head 0 by 1 + 2, head 1 by 3 + 4
    factor = torch.tensor([3.0] * 3 + [7.0] * 3, dtype=torch.float64)
    for rank, (out, grads, placements) in enumerate(run_ranks(shared_heads, 4)):
        torch.testing.assert_close(out, whole[..., 3 * (rank // 2) :][..., :3], **TOLERANCE)
        torch.testing.assert_close(grads["bias"], factor * SEQ, **TOLERANCE)
        expected = factor[:, None] * x.sum((0, 1))
        torch.testing.assert_close(grads["weight"], expected, **TOLERANCE)
        assert placements == str((Partial(),))


def parts(rank: int, world_size: int) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    value = torch.arange(8.0).view(4, 2)
    splits: tuple[dict[str, int], ...] = ({"tp": 0}, {"tp": 1}, {"ep": 0})
    specs = [ParameterSpec(name="w", shape=(4, 2), init="normal", split=x) for x in splits]
    local = [place(value, spec, mesh, "cpu").to_local() for spec in specs]
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in local)
    assert all(part.data_ptr() != value.data_ptr() for part in local)
    return local


def test_place_keeps_this_ranks_part_in_memory_of_its_own() -> None:
    first, second = run_ranks(parts, 2)
    assert [part.tolist() for part in first[:2]] == [[[0, 1], [2, 3]], [[0], [2], [4], [6]]]
    assert [part.tolist() for part in second[:2]] == [[[4, 5], [6, 7]], [[1], [3], [5], [7]]]
    assert first[2].tolist() == second[2].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_plain_parameters_work_on_one_rank() -> None:
    x = torch.ones(1, 2, IN)
    column = ColumnParallelLinear(COLUMN, tp=TensorParallel())
    assert column.bias is not None
    with torch.no_grad():
        column.weight.fill_(1.0)
        column.bias.fill_(0.5)
    assert local_weight(column.bias, partial=True) is column.bias
    assert torch.equal(F.linear(x, column.weight, column.bias), column(x))


def shared_input(
    rank: int, world_size: int, together: bool, units: int, splits: bool = False, keeps: bool = True
) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Three layers of one input: (results, gradient of x, gradients), x's summed over ranks.

    The second layer has no bias, the third no gradients, and two ranks share its one unit.
    """
    tp = tensor_parallel(splits)
    specs = [COLUMN, replace(COLUMN, bias=False), replace(COLUMN, units=units, shares_units=True)]
    layers = [ColumnParallelLinear(spec, tp=tp) for spec in specs]
    for number, layer in enumerate(layers):
        placed(layer, world_size, *(number, number + 5)[: len(layer.specs)])
    layers[2].weight.requires_grad_(False)
    x = numbers(0, 2, SEQ, IN)
    x = (x.chunk(world_size, 1)[rank] if splits else x).clone().requires_grad_()
    if together:
        results = list(products(Entered(x, tp, keeps), *layers))
    else:
        results = [layer(tp.enter(x)) for layer in layers]
    sum((y * numbers(7, *y.shape)).sum() for y in results).backward()
    assert x.grad is not None
    assert layers[2].weight.grad is None
    grads = whole_gradients(torch.nn.ModuleList(layers))
    return [y.detach() for y in results], x.grad, grads


@pytest.mark.parametrize(
    ("units", "splits", "keeps"),
    [(1, False, True), (2, False, True), (2, True, True), (1, True, False), (2, True, False)],
)
def test_products_of_one_input_are_those_of_each_layer(
    units: int, splits: bool, keeps: bool
) -> None:
    alone = run_ranks(shared_input, 2, False, units, splits, keeps)
    together = run_ranks(shared_input, 2, True, units, splits, keeps)
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def order_of_backward(rank: int, world_size: int) -> list[str]:
    """What backward of two layers of one input does, in order."""
    tp = tensor_parallel(True)
    layers = [ColumnParallelLinear(COLUMN, tp=tp) for _ in range(2)]
    for number, layer in enumerate(layers):
        placed(layer, world_size, number, number + 5)
    x = numbers(0, 1, SEQ, IN).chunk(world_size, 1)[rank].clone().requires_grad_()
    results = products(Entered(x, tp, keeps=False), *layers)
    seen: list[str] = []

    def watched(start: Any, name: str) -> Any:
        def started(*args: Any) -> Any:
            seen.append(f"start {name}")
            wait = start(*args)

            def waited() -> Tensor:
                seen.append(f"end {name}")
                return wait()  # type: ignore[no-any-return]

            return waited

        return started

    with pytest.MonkeyPatch.context() as patch, CountedOps() as ops:
        ops.names = seen
        patch.setattr(linear, "start_gather", watched(linear.start_gather, "gather"))
        leaving = TensorParallel.start_leaving
        patch.setattr(TensorParallel, "start_leaving", watched(leaving, "sum"))
        torch.autograd.backward(results, [torch.ones_like(y) for y in results])
    return [name for name in seen if " " in name or "mm" in name]


def test_products_are_computed_while_messages_travel() -> None:
    tokens, weights = ["mm", "addmm_"], ["mm", "mm"]
    order = ["start gather", *tokens, "start sum", "end gather", *weights, "end sum"]
    assert run_ranks(order_of_backward, 2) == [order] * 2


def test_products_add_up_gradients_in_one_tensor_and_skip_those_not_read() -> None:
    layers = [ColumnParallelLinear(COLUMN, tp=TensorParallel()).double() for _ in range(3)]
    for number, layer in enumerate(layers):
        layer.requires_grad_(False)
        for parameter in layer.parameters():
            parameter.copy_(numbers(number, *parameter.shape))
    x = numbers(0, 2, SEQ, IN).requires_grad_()
    first, _, third = products(Entered(x, TensorParallel(), keeps=False), *layers)
    grads = numbers(1, *first.shape), numbers(2, *third.shape)
    with CountedOps() as ops:
        (dx,) = torch.autograd.grad((first, third), x, grads)
    torch.testing.assert_close(dx, grads[0] @ layers[0].weight + grads[1] @ layers[2].weight)
    assert ops.names.count("addmm_") == ops.names.count("mm") == 1
    assert "add" not in ops.names
    assert "add_" not in ops.names


def test_results_that_nobody_reads_have_no_gradients() -> None:
    layer = ColumnParallelLinear(COLUMN, tp=TensorParallel()).double()
    x = numbers(0, 2, SEQ, IN).requires_grad_()
    (result,) = products(Entered(x, TensorParallel(), keeps=False), layer)
    gradients = torch.autograd.grad(Unread.apply(result), (x, layer.weight), allow_unused=True)
    assert gradients == (None, None)


class Unread(torch.autograd.Function):
    """A function of a tensor that it does not read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


class CountedOps(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
