"""Ranks of a context group that bring different rows are an error on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.row_digest import digest_rows
from cp_megatron.errors import ConfigError
from cp_megatron.model import huggingface
from tests.ranks import run_ranks

IDS = torch.arange(32).view(2, 16)


def attend(batch: dict[str, Any]) -> str:
    """One attention of a batch, as a layer of the model would call it; the error's text."""
    q = torch.ones(*batch["position_ids"].shape, 2, 4)
    try:
        batch["context_parallel"].cp.attention(q, q, q)
    except ConfigError as error:
        return str(error)
    return ""


def given(name: str, odd: bool) -> dict[str, Any]:
    """A batch of whole rows; ``odd`` changes what ``name`` says."""
    rows: dict[str, Any] = {"input_ids": IDS, "labels": IDS}
    if name == "other rows" and odd:
        rows["input_ids"] = IDS + 1
    if name == "rows in another order" and odd:
        rows = {key: x.flip(0) for key, x in rows.items()}
    if name == "tokens in another order" and odd:
        rows["input_ids"] = IDS.flip(1)
    if name == "other labels" and odd:
        rows["labels"] = IDS.masked_fill(IDS == 3, -100)
    if name == "no labels" and odd:
        del rows["labels"]
    if name == "another divisor":
        rows["num_items_in_batch"] = torch.tensor(7 + odd)
    if name == "longer rows" and odd:
        rows = {key: torch.cat([x, x], 1) for key, x in rows.items()}
    if name == "other embeddings":
        del rows["input_ids"]
        rows["inputs_embeds"] = torch.ones(2, 16, 8, requires_grad=True) + odd
    if name == "other documents" and odd:
        rows["position_ids"] = IDS[:1] % 4
    return rows


FAULTS = (
    *("other rows", "rows in another order", "tokens in another order", "other labels"),
    *("no labels", "another divisor", "longer rows", "other embeddings", "other documents"),
)


def answers(rank: int, world_size: int, check_ranks: str | bool) -> dict[str, str]:
    found = {}
    for name in (*FAULTS, "nothing else"):
        rows = given(name, odd=rank == 1 and name in FAULTS)
        if check_ranks is False and name in ("longer rows", "other documents"):
            continue  # would hang
        batch = huggingface.shard_batch(dist.group.WORLD, **rows, check_ranks=check_ranks)
        found[name] = attend(batch)
        if check_ranks == "once":
            found[name] += attend(batch) if not found[name] else ""
    return found


@pytest.mark.parametrize("check_ranks", [True, "once"])
def test_other_rows_are_an_error_on_every_rank(check_ranks: str | bool) -> None:
    results = run_ranks(answers, 2, check_ranks)
    for rank, result in enumerate(results):
        assert result.pop("nothing else") == ""
        for name, answer in result.items():
            assert answer.startswith("rows: differ from what rank "), (name, answer)
            assert f"what rank {1 - rank} of the group has" in answer
            assert "every rank of a context parallel group must get the same rows" in answer


def test_without_the_check_nothing_is_compared() -> None:
    for result in run_ranks(answers, 2, False):
        assert set(result.values()) == {""}


def test_every_layer_s_window_carries_the_digest() -> None:
    """A model whose layers all have a window never attends with the batch's own mask."""
    (result, other) = run_ranks(windowed, 2)
    assert result.startswith("rows: differ")
    assert other.startswith("rows: differ")


def windowed(rank: int, world_size: int) -> str:
    batch = huggingface.shard_batch(dist.group.WORLD, input_ids=IDS + rank)
    q = torch.ones(*batch["position_ids"].shape, 2, 4)
    try:
        batch["context_parallel"].within(3).attention(q, q, q)
    except ConfigError as error:
        return str(error)
    return ""


def changed(x: Tensor, place: int) -> Tensor:
    x = x.clone()
    x.view(-1)[place] += 1
    return x


def test_the_digest_is_that_of_values_in_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50_000, (3, 40), generator=generator)
    same = digest_rows({"input_ids": ids, "labels": ids})
    assert same.shape == ()
    assert same == digest_rows({"labels": ids.int(), "input_ids": ids.clone()})
    others = [
        *(digest_rows({"input_ids": changed(ids, place), "labels": ids}) for place in range(120)),
        *(digest_rows({"input_ids": ids, "labels": changed(ids, place)}) for place in range(120)),
        *(digest_rows({"input_ids": ids.roll(n, 1), "labels": ids}) for n in range(1, 40)),
        digest_rows({"input_ids": ids.T, "labels": ids.T}),
        digest_rows({"input_ids": ids.view(1, 120), "labels": ids}),
        digest_rows({"input_ids": ids}),
    ]
    assert len({int(x) for x in (same, *others)}) == len(others) + 1
    x = torch.randn(2, 5, 8, generator=generator).bfloat16()
    assert digest_rows({"x": x}) == digest_rows({"x": x.clone()}) != digest_rows({"x": x.flip(1)})
