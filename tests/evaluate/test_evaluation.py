"""Scores on any grid equal those of one rank and of plain loops over the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.batch.batch import IGNORED
from cp_megatron.data.rows.packing import row_mask
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer
from cp_megatron.evaluate import score as evaluation
from cp_megatron.evaluate.needle import Haystack, make_task
from cp_megatron.evaluate.results import Score
from cp_megatron.evaluate.score import (
    NO_TOKEN,
    LabeledRow,
    bucket_ends,
    perplexity_row,
    score,
    task_row,
    vocab_parallel_argmax,
)
from cp_megatron.model.parallelize import build_model
from cp_megatron.plan import Grid, Mask
from tests.ranks import run_ranks

LENGTH, VOCAB = 30, 257
STYLES = {
    "gpt": ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, init_method_std=0.2),
    "llama": ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        init_method_std=0.2,
        normalization="RMSNorm",
        swiglu=True,
        position_embedding_type="rope",
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    ),
}
STYLES["experts"] = replace(STYLES["llama"], num_experts=4, moe_ffn_hidden_size=24)
STYLES["window above"] = replace(STYLES["llama"], window_size=(4, 0), window_layers=(1,))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A grid, and the padding that its layout needs."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    padding: int = 0
    rows: int = 3
    dtype: Any = "float64"


def rows_of(number: int) -> LabeledRow:
    """Rows 0 and 2 are text; row 1 has three labels at its end, in cell 4."""
    tokens = np.random.default_rng(number).integers(0, VOCAB, LENGTH + 1)
    if number == 1:
        labels = np.full(LENGTH, IGNORED)
        labels[-3:] = tokens[-3:]
        return LabeledRow(tokens=tokens[:-1], labels=labels, cells=np.full(LENGTH, 4))
    return perplexity_row(tokens, bucket_ends(LENGTH, 4, LENGTH))


def build(style: str, case: Case) -> tuple[Any, ParallelGroups]:
    config = Config(
        model=STYLES[style],
        parallel=ParallelConfig(
            tensor_parallel_size=case.tp,
            context_parallel_size=case.cp,
            sequence_parallel=style == "experts" and case.tp > 1,
        ),
        data=DataConfig(seq_length=LENGTH + case.padding),
        train=TrainConfig(seed=5),
    )
    grid = Grid(dp=case.dp, cp=case.cp, tp=case.tp, ep=case.ep)
    groups = ParallelGroups.create(grid, "cpu", has_experts=style == "experts")
    return build_model(config, groups, vocab_size=VOCAB, dtype=case.dtype, device="cpu"), groups


def scores(rank: int, world_size: int, style: str, case: Case, piece: int) -> list[list[float]]:
    model, groups = build(style, case)
    mask = row_mask([LENGTH], document_mask=False, padding=case.padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "PIECE", piece)
        table = score(
            model,
            groups,
            ContextParallel(groups.cp, mask),
            rows_of,
            num_rows=case.rows,
            num_cells=6,
            device=torch.device("cpu"),
            padding=case.padding,
        )
    assert "forward" not in vars(model.head)
    return table.tolist()


def by_loops(rank: int, world_size: int, style: str, rows: int) -> list[list[float]]:
    """Computes the table from whole logits on one rank, one token at a time."""
    model, groups = build(style, Case())
    model.eval()
    cp = ContextParallel(groups.cp, Mask.causal(LENGTH))
    table = [[0.0, 0.0, 0.0] for _ in range(6)]
    for number in range(rows):
        row = rows_of(number)
        with torch.no_grad():
            logits = model(torch.from_numpy(row.tokens)[None], cp=cp)[0]
        for position in range(LENGTH):
            label = int(row.labels[position])
            if label == IGNORED:
                continue
            values = logits[position].tolist()
            cell = table[int(row.cells[position])]
            cell[0] += math.log(sum(math.exp(value) for value in values)) - values[label]
            cell[1] += float(values.index(max(values)) == label)
            cell[2] += 1
    return table


@cache
def oracle(style: str, rows: int) -> npt.NDArray[np.float64]:
    return np.array(run_ranks(by_loops, 1, style, rows)[0])


@pytest.mark.parametrize(
    ("style", "case"),
    [
        # Sorted by the number of ranks, so that the pool can keep its group.
        ("llama", Case()),
        ("gpt", Case(cp=2, padding=2)),
        ("llama", Case(dp=2)),
        ("experts", Case(tp=2)),
        ("experts", Case(dp=2, ep=2)),
        ("llama", Case(cp=4, padding=2)),
        ("gpt", Case(tp=2, cp=2, padding=2)),
        ("window above", Case(tp=2, cp=2, padding=2)),
        ("gpt", Case(dp=2, cp=2, padding=2)),
        ("experts", Case(tp=2, cp=2, ep=2, padding=2)),
        pytest.param("llama", Case(tp=2, cp=2, padding=2, rows=1), marks=pytest.mark.slow),
        pytest.param("llama", Case(tp=4, rows=2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("piece", [4])
def test_any_grid_equals_plain_loops(style: str, case: Case, piece: int) -> None:
    expected = oracle(style, case.rows)
    for found in run_ranks(scores, case.tp * case.cp * case.dp, style, case, piece):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=0)


def test_the_rows_have_tokens_in_the_cells() -> None:
    table = oracle("llama", 3)
    # Buckets 0 to 3, 4 to 7, 8 to 15 and 16 to 29 of two rows, three tokens of row 1, nothing.
    assert table[:, 2].tolist() == [8, 8, 16, 28, 3, 0]
    assert table[:5, 0].min() > 0


def test_float32_is_near() -> None:
    case = Case(tp=2, cp=2, padding=2, dtype="float32")
    for found in run_ranks(scores, 4, "llama", case, 1024):
        np.testing.assert_allclose(found, oracle("llama", 3), rtol=1e-4)


def argmax(rank: int, world_size: int, logits: torch.Tensor) -> list[int]:
    part = logits.chunk(world_size, dim=-1)[rank]
    return vocab_parallel_argmax(part, dist.group.WORLD).tolist()


def test_the_lowest_of_equal_tokens_is_taken_and_none_for_nan() -> None:
    logits = torch.tensor(
        [
            [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0],
            [-1.0, -2.0, -3.0, -4.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf],
            [5.0, 1.0, 1.0, 0.0, 1.0, torch.nan, 1.0, 0.0],
        ]
    )
    for world_size in (1, 2, 4):
        for found in run_ranks(argmax, world_size, logits):
            assert found == [1, 7, 0, NO_TOKEN]


def test_buckets_are_shared_by_lengths() -> None:
    assert bucket_ends(2048, 4, 2048) == [256, 512, 1024, 2048]
    assert bucket_ends(600, 4, 2048) == [256, 512, 600]
    assert bucket_ends(100, 4, 2048) == [100]
    assert bucket_ends(256, 4, 2048) == [256]
    assert bucket_ends(5, 30, 5) == [1, 2, 4, 5]
    assert bucket_ends(3000, 1, 3000) == [3000]
    row = perplexity_row(np.arange(8), [1, 2, 4, 7])
    assert row.cells.tolist() == [0, 1, 2, 2, 3, 3, 3]
    assert row.labels.tolist() == [1, 2, 3, 4, 5, 6, 7]
    answers = perplexity_row(np.arange(4), [3], np.array([False, True, False]))
    assert answers.labels.tolist() == [IGNORED, 2, IGNORED]


def test_only_the_answer_counts() -> None:
    haystack = Haystack.of("One fish. Two fish.", ByteTokenizer().encode)
    task = make_task("needle", haystack, ByteTokenizer().encode, seed=1, length=400, depth=50)
    row = task_row(task, 7)
    counted = np.flatnonzero(row.labels != IGNORED)
    assert row.labels[counted].tolist() == task.tokens[counted + 1].tolist()
    assert bytes(row.labels[counted].astype(np.uint8)).decode() == task.answer
    assert counted[-1] == task.length - 2
    assert set(row.cells.tolist()) == {7}


def follows_greedy(rank: int, world_size: int, style: str) -> list[tuple[float, bool]]:
    """Returns the right guesses of one pass, and whether greedy decoding gives the answer."""
    model, groups = build(style, Case())
    model.eval()
    found = []
    for number in range(6):
        prompt = rows_of(number).tokens[:20]
        tokens = greedy(model, groups, prompt, 4)
        if number % 2:
            tokens[-1 - number // 2] += 1  # a wrong token: the first, the second, the last
        row = np.concatenate([prompt, tokens])
        labels = np.full(24, IGNORED)
        labels[19:23] = tokens
        (sums,) = score(
            model,
            groups,
            ContextParallel(groups.cp, Mask.causal(24)),
            lambda _, row=row, labels=labels: LabeledRow(
                tokens=row, labels=labels, cells=np.zeros(24, dtype=np.int64)
            ),
            num_rows=1,
            num_cells=1,
            device=torch.device("cpu"),
        )
        found.append((float(sums[1]), bool((greedy(model, groups, prompt, 4) == tokens).all())))
    return found


def greedy(model: Any, groups: ParallelGroups, prompt: npt.NDArray[np.int64], count: int) -> Any:
    tokens = prompt
    for _ in range(count):
        cp = ContextParallel(groups.cp, Mask.causal(len(tokens)))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None], cp=cp)
        tokens = np.append(tokens, logits[0, -1].argmax().item())
    return tokens[len(prompt) :]


def test_one_pass_predicts_greedy_decoding() -> None:
    found = run_ranks(follows_greedy, 1, "llama")[0]
    assert [exact for _, exact in found] == [True, False] * 3
    assert all((right == 4) == exact for right, exact in found)


def test_scores_of_no_tokens_and_of_large_losses() -> None:
    assert Score.of([0, 0, 0]) == Score(tokens=0, loss=0.0, accuracy=0.0)
    assert Score.of([2e9, 1, 2]).perplexity == math.inf
    assert Score.of([6, 1, 2]) == Score(tokens=2, loss=3.0, accuracy=0.5)
    assert replace(Score.of([6, 1, 2]), loss=0.0).perplexity == 1.0
