"""Documents and padding as collators write them: read, checked against each other, and trained on.

The references run each document alone through transformers' own attention.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cp_megatron.errors import ConfigError
from cp_megatron.model import huggingface
from cp_megatron.model.huggingface.row_documents import read_documents
from tests.model.test_huggingface import VOCABULARY, make_model, token_losses
from tests.ranks import run_ranks

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)


def ints(*rows: str) -> Tensor:
    return torch.tensor([[int(x) for x in row.split()] for row in rows])


def both(mask: str, positions: str) -> dict[str, Tensor]:
    return {"attention_mask": ints(mask), "position_ids": ints(positions)}


def lengths_of(shape: tuple[int, int] = (1, 7), **said: Any) -> list[list[int]]:
    named = {name: said.pop(name, None) for name in ("position_ids", "attention_mask")}
    return read_documents(shape, stated=said, **named).lengths


CU = torch.tensor([0, 3, 5, 7], dtype=torch.int32)


@pytest.mark.parametrize(
    ("said", "lengths"),
    [
        ({}, [7]),
        ({"position_ids": ints("0 1 2 0 1 0 1")}, [3, 2, 2]),
        ({"attention_mask": ints("1 1 1 2 2 3 3")}, [3, 2, 2]),
        ({"attention_mask": ints("1 1 1 2 2 0 0")}, [3, 2, 2]),
        ({"attention_mask": ints("2 2 2 1 1 3 3")}, [3, 2, 2]),
        ({"attention_mask": ints("1 1 1 0 0 2 2")}, [3, 2, 2]),
        ({"attention_mask": ints("0 0 0 1 1 1 1")}, [3, 4]),
        ({"attention_mask": ints("1 1 1 1 1 0 0").bool()}, [5, 2]),
        ({"attention_mask": ints("1 1 1 1 1 0 0").bfloat16()}, [5, 2]),
        ({"attention_mask": ints("0 1 1 1 1 0 0")}, [1, 4, 2]),
        ({"attention_mask": ints("0 0 0 0 0 0 0")}, [7]),
        (
            both("1 1 1 1 1 1 1", "0 1 2 0 1 0 1"),
            [3, 2, 2],
        ),
        (
            both("1 1 1 2 2 3 3", "0 1 2 0 1 5 6"),
            [3, 2, 2],
        ),
        (
            both("1 1 1 1 1 0 0", "0 1 2 0 1 1 1"),
            [3, 2, 2],
        ),
        (
            both("1 1 1 0 0 1 1", "0 1 2 0 0 0 1"),
            [3, 2, 2],
        ),
        (both("0 0 0 1 1 1 1", "1 1 1 0 1 2 3"), [3, 4]),
        ({"seq_idx": ints("0 0 0 1 1 2 2")}, [3, 2, 2]),
        ({"cu_seq_lens_q": CU, "cu_seq_lens_k": CU, "max_length_q": 3}, [3, 2, 2]),
        ({"cu_seq_lens_q": [0, 3, 5, 7, 7], "max_length_q": torch.tensor(9)}, [3, 2, 2]),
        ({"position_ids": ints("0 1 2 0 1 0 1"), "cu_seq_lens_q": CU}, [3, 2, 2]),
        ({"position_ids": ints("2 3 4 2 3 2 3"), "seq_idx": ints("0 0 0 1 1 2 2")}, [3, 2, 2]),
        ({"position_ids": ints("0 1 2 0 1 0 1").expand(3, 1, 7)}, [3, 2, 2]),
        ({"position_ids": ints("0 1 2 0 1 0 1").expand(4, 1, 7)}, [3, 2, 2]),
    ],
)
def test_what_collators_write_is_read(said: dict[str, Any], lengths: list[int]) -> None:
    assert lengths_of(**said) == [lengths]


@pytest.mark.parametrize(
    ("said", "start"),
    [
        ({"attention_mask": ints("1 1 1 0 1 1 1")}, "attention_mask: has document 1 of row 0 in"),
        ({"attention_mask": ints("1 1 2 2 2 1 1")}, "attention_mask: has document 1 of row 0 in"),
        ({"attention_mask": ints("1 1 2 0 2 3 3")}, "attention_mask: has document 2 of row 0 in"),
        (
            both("1 1 1 0 0 1 1", "0 1 2 1 1 3 4"),
            "attention_mask: has document 1 of row 0 in pieces; one begins at token 5",
        ),
        (
            both("1 1 1 2 2 3 3", "0 1 2 3 4 5 6"),
            "attention_mask: separates other documents than position_ids, first at token 3 of row",
        ),
        (
            both("1 1 1 2 2 2 2", "0 1 2 0 1 0 1"),
            "attention_mask: separates other documents than position_ids, first at token 5 of row",
        ),
        ({"position_ids": ints("0 1 2 3 0 0 1"), "cu_seq_lens_q": CU}, "cu_seq_lens_q: separates"),
        ({"cu_seq_lens_q": CU, "cu_seq_lens_k": [0, 7]}, "cu_seq_lens_k: separates"),
        ({"cu_seq_lens_q": CU, "seq_idx": ints("0 0 0 0 0 0 0")}, "cu_seq_lens_q: separates"),
        ({"cu_seq_lens_q": [0, 3, 6]}, "cu_seq_lens_q [0, 3, 6]: must rise from 0 to the number"),
        ({"cu_seq_lens_q": [0, 5, 3, 7]}, "cu_seq_lens_q [0, 5, 3, 7]: must rise"),
        ({"cu_seq_lens_q": CU, "max_length_k": 2}, "max_length_k 2: is less than 3"),
        ({"attention_mask": ints("1 1 1 1 1 -1 0")}, "attention_mask with -1: must be ones"),
        ({"attention_mask": torch.zeros(1, 7) + 0.5}, "attention_mask with 0.5: must be ones"),
        ({"attention_mask": torch.ones(1, 1, 7, 7)}, "attention_mask (1, 1, 7, 7): must be [1, 7]"),
        ({"seq_idx": ints("0 0 1")}, "seq_idx (1, 3): must be [1, 7]"),
        (
            {"position_ids": torch.arange(7).expand(3, 1, 7) * ints("1 1 0").view(3, 1, 1)},
            "position_ids (3, 1, 7): has different positions of one token in time, height and",
        ),
        ({"position_ids": ints("0 1 2 3 4 5 6").expand(2, 1, 7)}, "position_ids (2, 1, 7): must"),
        ({"shape": (2, 4), "cu_seq_lens_q": [0, 3, 6, 8]}, "cu_seq_lens_q [0, 3, 6, 8]: has a doc"),
    ],
)
def test_what_contradicts_itself_is_refused(said: dict[str, Any], start: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(start)):
        lengths_of(**said)


def test_padding_and_documents_in_a_batch() -> None:
    ids = torch.arange(10, 22).view(2, 6)
    mask = ints("0 0 1 1 1 1", "1 1 2 2 2 0")
    batch = huggingface.shard_batch(None, input_ids=ids, attention_mask=mask, labels=ids)
    assert batch["context_parallel"].cp.mask.lengths == (2, 4, 2, 3, 1)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 2, 0]]
    counted = [-100, -100, 13, 14, 15, -100, 17, 18, 19, 20, -100, -100]
    assert batch["labels"].tolist() == [counted]
    assert batch["num_items_in_batch"] == 7
    assert "attention_mask" not in batch
    whole = batch["context_parallel"].whole(batch["input_ids"])
    assert whole.tolist() == ids.tolist()


def test_given_positions_stay_but_for_padding() -> None:
    ids = torch.zeros(1, 6, dtype=torch.long)
    mask, positions = ints("0 0 1 1 1 1"), ints("9 9 5 6 7 8")
    batch = huggingface.shard_batch(
        None, input_ids=ids, attention_mask=mask, position_ids=positions
    )
    assert batch["position_ids"].tolist() == [[0, 1, 5, 6, 7, 8]]


def test_words_of_flash_attention_are_left_out() -> None:
    ids = torch.zeros(1, 7, dtype=torch.long)
    said = {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU, "max_length_q": 3, "max_length_k": 3}
    batch = huggingface.shard_batch(None, input_ids=ids, seq_idx=ints("0 0 0 1 1 2 2"), **said)
    assert batch["context_parallel"].cp.mask.lengths == (3, 2, 2)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert not {*said, "seq_idx"} & batch.keys()


# ---- against transformers ------------------------------------------------------------------------


@needs_transformers
def test_what_transformers_collators_write() -> None:
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [10, 11]}]
    plain = DataCollatorWithFlattening()(rows, return_tensors="pt")
    full = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    said = dict(full(rows, return_tensors="pt"))
    assert {"cu_seq_lens_q", "max_length_q", "seq_idx"} <= said.keys()
    batch, reference = (huggingface.shard_batch(None, **x) for x in (said, plain))
    assert batch["context_parallel"].cp.mask == reference["context_parallel"].cp.mask
    assert batch["context_parallel"].cp.mask.lengths == (3, 2, 2)
    said["cu_seq_lens_q"] = torch.tensor([0, 5, 7], dtype=torch.int32)
    with pytest.raises(ConfigError, match="cu_seq_lens_q: separates other documents"):
        huggingface.shard_batch(None, **said)


# Documents of one row, each with the padding before it; and padding after the last one.
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=4)


@st.composite
def padded_batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """Rows of documents with padding anywhere, as a mask with numbers, and labels everywhere."""
    rows = draw(st.lists(ROWS, min_size=1, max_size=2))
    used = [sum(before + length for before, length in row) for row in rows]
    seq_len = max(used) + draw(st.integers(0, 3))
    numbers = torch.zeros(len(rows), seq_len, dtype=torch.long)
    for place, row in enumerate(rows):
        end = 0
        for number, (before, length) in enumerate(row, 1):
            numbers[place, end + before : end + before + length] = number
            end += before + length
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(0, VOCABULARY, numbers.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": numbers}


def each_alone(model: Any, rows: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The sum of the losses of documents that are run alone, and the logits of their tokens."""
    losses, logits = torch.zeros((), dtype=torch.float64), []
    for ids, numbers in zip(rows["input_ids"], rows["attention_mask"], strict=True):
        for number in range(1, int(numbers.max()) + 1):
            document = ids[numbers == number][None]
            out = model(input_ids=document, use_cache=False).logits
            logits.append(out[0])
            labels = torch.nn.functional.pad(document[:, 1:], (0, 1), value=-100)
            losses = losses + token_losses(out, labels)
    return losses, logits


def padded_losses(
    rank: int, world_size: int, name: str, batches: list[dict[str, Tensor]]
) -> list[float]:
    """Relative errors of the losses and of the real tokens' logits on 1, 2 and 4 ranks."""
    huggingface.register()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    whole, model = make_model(name, "sdpa"), make_model(name, "cp_megatron")
    errors = []
    for number, rows in enumerate(batches):
        group = (None, pairs[rank // 2], dist.group.WORLD)[number % 3]
        with torch.no_grad():
            expected, alone = each_alone(whole, rows)
            numbers = rows["attention_mask"]
            # No first token of a document is a target: of the label that transformers would count.
            first = torch.nn.functional.pad(numbers[:, :-1], (1, 0)) != numbers
            labels = rows["input_ids"].masked_fill(first, -100)
            batch = huggingface.shard_batch(group, labels=labels, **rows)
            logits = model(**batch).logits
            found = token_losses(logits, batch["shift_labels"])
            if group is not None:
                dist.all_reduce(found, group=group)
            errors.append(float((found - expected).abs() / expected.abs().clamp(min=1)))
            got = batch["context_parallel"].whole(logits)
            parts = [(row, number) for row in range(len(numbers)) for number in range(1, 5)]
            real = torch.cat([got[row][numbers[row] == number] for row, number in parts])
            errors.append(float((real - torch.cat(alone)).norm() / torch.cat(alone).norm()))
    return errors


def drawn(count: int) -> list[dict[str, Tensor]]:
    """The same batches each time: hypothesis finds them here, because starting ranks costs."""
    found: list[dict[str, Tensor]] = []

    @settings(max_examples=count, derandomize=True, database=None, deadline=None)
    @given(padded_batches())
    def collect(rows: dict[str, Tensor]) -> None:
        found.append(rows)

    collect()
    return found


@needs_transformers
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "qwen2"])
def test_documents_and_padding_are_each_document_alone(name: str) -> None:
    for errors in run_ranks(padded_losses, 4, name, drawn(45), timeout=200):
        assert max(errors) < 1e-12
