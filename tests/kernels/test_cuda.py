"""The CUDA kernel without a GPU: its arguments, by the ops' schemas and fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

from cp_megatron.kernels import cuda
from cp_megatron.kernels.cuda import CudaKernel
from cp_megatron.kernels.interface import BackwardInputs
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.kernels.windows import flash_window, sub_tiles
from cp_megatron.plan import Schedule
from cp_megatron.plan.tiling import Band
from tests.kernels.cases import TILES, allowed
from tests.kernels.double import flash_mask
from tests.plan.cases import property_settings, schedules


def is_trimmed(band: Band, rows: int, columns: int) -> bool:
    mask = allowed(band, rows, columns)
    return bool(mask.any(0).all() and mask.any(1).all())


def flash_mask_of(band: Band, rows: int, columns: int) -> torch.Tensor:
    """bool [rows, columns]: the mask that flash attention makes of the sub-tiles' windows."""
    found = torch.zeros(rows, columns, dtype=torch.bool)
    stop = 0
    for part in sub_tiles(band, rows, columns):
        assert part.rows.start == stop
        stop = part.rows.stop
        shape = stop - part.rows.start, part.columns.stop - part.columns.start
        assert is_trimmed(part.band, *shape)
        _, *window = flash_window(part.band, *shape)
        found[part.rows, part.columns] = flash_mask(*shape, False, *window)
    assert stop == rows
    return found


def test_windows_by_brute_force() -> None:
    """Every band on every small tile that has no empty row or column."""
    sides = (None, 0, 1, 2, 3, 5, 8)
    seen, cut = 0, 0
    for rows in range(1, 10):
        for columns in range(1, 7):
            for band in (Band(left, right) for left in sides for right in sides):
                if is_trimmed(band, rows, columns):
                    found = flash_mask_of(band, rows, columns)
                    assert torch.equal(found, allowed(band, rows, columns)), (band, rows, columns)
                    seen += 1
                    cut += len(sub_tiles(band, rows, columns)) > 1
                    if rows <= columns:
                        assert len(sub_tiles(band, rows, columns)) == 1
    assert seen > 900
    assert cut > 100


def test_a_tile_that_is_not_trimmed_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="not trimmed"):
        flash_window(Band(left=0), 5, 1)
    with pytest.raises(AssertionError, match="not trimmed"):
        flash_window(Band(right=0), 1, 5)


@given(schedules(max_cp=6))
@property_settings(60)
def test_every_tile_of_a_plan_has_a_window(schedule: Schedule) -> None:
    for rank in range(schedule.layout.cp_size):
        for turn in schedule.rounds(rank):
            for tile in turn.tiles:
                rows, columns = tile.q1 - tile.q0, tile.k1 - tile.k0
                assert torch.equal(
                    flash_mask_of(tile.band, rows, columns), allowed(tile.band, rows, columns)
                )


def arguments(
    monkeypatch: pytest.MonkeyPatch,
    band: Band,
    rows: int,
    columns: int,
    *,
    dims: tuple[int, int] = (16, 16),
    deterministic: bool = False,
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """The arguments that forward and backward pass to their ops, by the names of the schemas."""
    seen: list[dict[str, Any]] = []

    def spy(name: str) -> None:
        packet = getattr(torch.ops.aten, name)
        schema = packet.default._schema.arguments

        def call(*args: Any, **kwargs: Any) -> Any:
            positional = [a.name for a in schema if not a.kwarg_only]
            assert len(args) == len(positional)
            assert set(kwargs) <= {a.name for a in schema if a.kwarg_only}
            switch = torch.are_deterministic_algorithms_enabled()
            seen.append(dict(zip(positional, args, strict=True)) | kwargs | {"switch": switch})
            return packet(*args, **kwargs)

        monkeypatch.setattr(cuda, "_forward" if "forward" in name else "_backward", call)

    spy("_flash_attention_forward")
    spy("_flash_attention_backward")
    dim, v_dim = dims
    # A build without CUDA cannot slice fake CUDA tensors, but it can slice meta tensors.
    device = device if dims == (16, 16) else "meta"
    with FakeTensorMode():
        q = torch.empty(2, rows, 6, dim, device=device, dtype=torch.bfloat16)
        k = torch.empty(2, columns, 2, dim, device=device, dtype=q.dtype)
        v = torch.empty(2, columns, 2, v_dim, device=device, dtype=q.dtype)
        kernel = CudaKernel(deterministic=deterministic)
        out, lse = kernel.forward(q, k, v, band, 0.3)
        assert (out.shape, out.dtype) == ((2, rows, 6, v_dim), q.dtype)
        assert (lse.shape, lse.dtype) == ((2, 6, rows), torch.float32)
        grads = kernel.backward(BackwardInputs(out, q, k, v, out, lse), band, 0.3)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]
        if device == "cuda":
            assert seen[0]["query"] is seen[1]["query"] is q
            assert seen[0]["key"] is seen[1]["key"] is k
            assert seen[0]["value"] is seen[1]["value"] is v
            assert seen[1]["grad_out"] is seen[1]["out"] is out
    return seen


@pytest.mark.parametrize(("dims", "width"), [((5, 3), 8), ((64, 40), 64), ((192, 129), 192)])
def test_heads_are_padded_to_one_width_that_the_op_takes(
    dims: tuple[int, int], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in arguments(monkeypatch, Band(), 4, 6, dims=dims):
        assert {call[name].shape[-1] for name in ("query", "key", "value")} == {width}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("before", [None, "warn", "on"])
def test_backward_runs_under_the_switch_and_restores_it(
    deterministic: bool, before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.use_deterministic_algorithms(before is not None, warn_only=before == "warn")
    try:
        _, backward = arguments(monkeypatch, Band(), 4, 4, deterministic=deterministic)
        after = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert backward["switch"] is (deterministic or before is not None)
    assert after == (before is not None, before == "warn")
    assert load_kernel("cuda", deterministic=True) is not load_kernel("cuda")


@pytest.mark.parametrize("tile", TILES)
def test_the_ops_get_the_tile(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    band, rows, columns = TILES[tile]
    cut = sub_tiles(band, rows, columns)
    assert len(cut) == (2 if tile == "left only" else 1)
    device = "meta" if len(cut) > 1 else "cuda"
    seen = arguments(monkeypatch, band, rows, columns, device=device)
    for call, part in zip(seen, [*cut, *cut], strict=True):
        rows, columns = (x.stop - x.start for x in (part.rows, part.columns))
        assert (call["max_q"], call["max_k"]) == (rows, columns)
        assert call["cum_seq_q"] is call["cum_seq_k"] is None
        assert call["dropout_p"] == 0.0
        assert call["scale"] == 0.3
        window = call["window_size_left"], call["window_size_right"]
        asked = flash_mask(rows, columns, call["is_causal"], *window)
        assert torch.equal(asked, allowed(part.band, rows, columns))


def test_the_random_state_is_two_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    _, backward = arguments(monkeypatch, Band(), 4, 4)
    assert backward["rng_state"].numel() == backward["unused"].numel() == 2
    assert backward["rng_state"].dtype == torch.uint64
    assert isinstance(load_kernel("cuda"), CudaKernel)
    assert load_kernel("cuda").compute_dtype(torch.bfloat16) == torch.bfloat16


def test_the_op_gets_a_contiguous_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the ring, lse is a view of the shard's, and the op reads it as contiguous."""
    shard_lse = torch.randn(2, 9, 7)
    view = shard_lse[:, 1:7, 2:6]
    seen: list[torch.Tensor] = []

    def call(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        seen.append(args[5])
        return args[1], args[2], args[3]

    monkeypatch.setattr(cuda, "_backward", call)
    q = torch.zeros(2, 4, 6, 8)
    CudaKernel().backward(BackwardInputs(q, q, q, q, q, view), Band(), 1.0)
    assert seen[0].is_contiguous()
    assert torch.equal(seen[0], view)
