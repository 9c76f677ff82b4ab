"""Tests the prediction against counts by hand; test_measure.py compares it with measurements."""

from __future__ import annotations

import io
import time
from functools import partial

import pytest
from rich.console import Console

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.config import tokens_with_logits
from cp_megatron.memory import kinds
from cp_megatron.memory.kinds import Held
from cp_megatron.memory.memory_report import MemoryReport, predict_report, print_prediction
from cp_megatron.memory.predict import expert_rows, predict, predict_ranks
from cp_megatron.preflight.check import check
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.spec import ModelSpec

MODEL = ["--num-layers", "3", "--hidden-size", "64", "--num-attention-heads", "4"]
MODEL += ["--num-query-groups", "2", "--ffn-hidden-size", "96", "--seq-length", "128"]
BATCH = ["--micro-batch-size", "2", "--global-batch-size", "8"]


def planned(*argv: str, world_size: int = 1, device: str = "cpu") -> RunPlan:
    preset = [] if "--preset" in argv else ["--preset", "toy", *MODEL, *BATCH]
    arguments = parse_arguments(["--dry-run", "--device", device, *preset, *argv])
    return check(arguments.config, Launch(), dry_run=True, dry_run_world_size=world_size)


def bytes_of(plan: RunPlan, rank: int = 0) -> dict[str, int]:
    """Predicted bytes by kind, or for activations by module."""
    return {
        row.detail if row.kind == kinds.ACTIVATIONS else row.kind: row.num_bytes
        for row in predict(plan, rank)
    }


B, S, H, F, L, V = 2, 128, 64, 96, 3, 384
GRID = ["--tensor-parallel-size", "2", "--sequence-parallel", "--bf16"]


def test_a_step_counted_by_hand() -> None:
    found = bytes_of(planned(*GRID, "--fsdp-reshard", "always", world_size=4))  # dp 2, tp 2
    stream = B * S // 2 * H  # the rank's part of the residual stream
    norm = 2 * stream + 4 * B * S // 2  # x, and 1 / rms in float32
    assert found[kinds.ATTENTION_NORM] == found[kinds.MLP_NORM] == L * norm
    assert found[kinds.FINAL_NORM] == norm
    heads, kv_heads, width = 2, 1, 16
    normed, rope = 2 * stream, 4 * S * width  # float32, one table for all layers
    kept = 2 * B * S * (2 * heads + 2 * kv_heads) * width  # q, k, v, out
    assert found[kinds.ATTENTION] == rope + L * (normed + kept + 4 * B * S * heads)
    assert found[kinds.MLP] == L * (normed + 3 * 2 * B * S * F // 2)
    assert found[kinds.EMBEDDING] == B * S * (8 + 1)
    assert found[kinds.LOSS] == 2 * stream + 4 * (V // 2 * H + B * S + 1)
    assert found[kinds.LOGITS] == (2 + 4) * B * S * V // 2
    per_layer = H * (4 * width + 2 * 2 * width + 4 * width) // 2 + 3 * H * F // 2 + 2 * H
    number = (V // 2 * H + H + L * per_layer) // 2
    assert found[kinds.PARAMETERS] == found[kinds.GRADIENTS] == 4 * number
    assert found[kinds.OPTIMIZER] == 8 * number + 4 * (1 + 1 + L * 9)
    assert found[kinds.GATHERED] == 2 * (V // 2 * H + H)
    assert found[kinds.INPUTS] == found[kinds.OTHER] == 0
    whole = bytes_of(planned(*GRID, world_size=4))  # as a model as small as this is kept
    assert (whole[kinds.GATHERED], whole[kinds.WHOLE]) == (2 * 2 * number, 4 * 2 * number)


@pytest.mark.parametrize(
    ("flags", "device", "per_logit"),
    [
        ([], "cpu", 4),
        (["--bf16"], "cpu", 2 + 4),
        (["--bf16", "--final-logit-softcapping", "30"], "cpu", 2 + 2 * 4),
        (["--bf16", "--final-logit-softcapping", "30"], "cuda", 2),
    ],
)
def test_logits_of_one_chunk(flags: list[str], device: str, per_logit: int) -> None:
    found = bytes_of(planned("--loss-chunk-size", "64", *flags, device=device))
    assert found[kinds.LOGITS] == per_logit * 64 * V


def test_default_chunks_hold_so_many_logits() -> None:
    default = partial(tokens_with_logits, None)
    assert [default(width, on_cuda=False) for width in (384, 8192, 1 << 17, 1 << 18)] == [
        *(10_922, 512, 512, 256),
    ]
    assert [default(width, on_cuda=True) for width in (1 << 16, 1 << 17)] == [8192, 4096]
    assert tokens_with_logits(3, 8192, on_cuda=True) == 3


def test_recomputation_keeps_what_it_says() -> None:
    one = 4 * B * S * H
    full = bytes_of(planned("--recompute-granularity", "full", "--recompute-num-layers", "2"))
    plain = bytes_of(planned())
    assert full[kinds.INPUTS] == 2 * one
    assert 3 * full[kinds.MLP] == plain[kinds.MLP]
    moved = bytes_of(planned("--recompute-granularity", "full", "--cpu-offloading"))
    assert (moved[kinds.INPUTS], moved[kinds.HOST]) == (0, 3 * one)
    selective = bytes_of(planned("--recompute-granularity", "selective"))
    assert selective[kinds.INPUTS] == 3 * 2 * one
    assert selective[kinds.ATTENTION] == 3 * (one + 4 * B * S * 4)


def test_rooms_of_a_ring_counted_by_hand() -> None:
    """Two ranks, zigzag: each reads of the other's shard what the mask allows."""
    plan = planned("--context-parallel-size", "2", world_size=2)
    token = B * 2 * (16 + 16) * 4  # batch, kv heads, k and v
    # Rank 1 reads the early half of rank 0's shard, rank 0 all of rank 1's.
    assert bytes_of(plan, 0)[kinds.EXCHANGE] == (64 + 32 + 64 + 32) * token
    assert bytes_of(plan, 1)[kinds.EXCHANGE] == (64 + 32 + 32 + 64) * token


def test_no_device_keeps_masks() -> None:
    words = ["--hidden-dropout", "0.1", "--bf16"]
    cpu, cuda = (bytes_of(planned(*words, device=device)) for device in ("cpu", "cuda"))
    assert cuda[kinds.FINAL_NORM] == cpu[kinds.FINAL_NORM] == 2 * B * S * H + 4 * B * S
    assert cuda[kinds.OTHER] == cpu[kinds.OTHER] == 8 * B * S
    assert cuda[kinds.MLP] == cpu[kinds.MLP]


def test_the_optimizer_on_the_host_is_said_apart() -> None:
    words = ["--optimizer-cpu-offload"]
    rows = predict(planned(*words, device="cuda"), 0)
    assert [row.detail for row in rows[:3]] == [kinds.HOST] * 3
    found = {row.kind: row.num_bytes for row in rows}
    plain = bytes_of(planned(device="cuda"))
    # FSDP, which moves the parameters, keeps what lies outside of the layers on the device.
    more = found[kinds.GATHERED] - plain[kinds.GATHERED]
    assert more > 0
    assert found[kinds.AFTER_FORWARD] - more == plain[kinds.AFTER_FORWARD] - plain[kinds.PARAMETERS]


def test_many_ranks_are_quick() -> None:
    words = ["--preset", "llama3-8b", "--context-parallel-size", "16", "--global-batch-size", "64"]
    plan = planned(*words, "--tensor-parallel-size", "8", world_size=1024)
    begin = time.process_time()
    found = predict_ranks(plan, range(1024))
    assert time.process_time() - begin < 5
    assert found[777] == predict(plan, 777)


def shown(plan: RunPlan, *, width: int = 80) -> str:
    file = io.StringIO()
    print_prediction(plan, Console(file=file, width=width))
    return file.getvalue()


def test_a_prediction_is_shown_for_each_device_that_may_be() -> None:
    text = shown(planned(device="auto"))
    assert "memory on cpu, float32" in text
    assert "memory on cuda, bfloat16" in text
    assert "measured" not in text
    assert "other" not in text  # a row of zeros
    rows = {
        line.strip().split("  ")[0]: line.split()[-1] for line in text.splitlines() if line.split()
    }
    assert float(rows["final norm"]) == pytest.approx(B * S * (2 * H + 4) / 2**20, abs=1e-4)


def test_ranks_that_are_alike_share_a_column_and_many_are_two() -> None:
    assert "ranks 0-1" in shown(planned(world_size=2))
    text = shown(planned("--context-parallel-size", "16", world_size=16))
    assert "least of all ranks" in text
    assert "most of all ranks" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_table_has_all_columns_on_any_console(width: int) -> None:
    plan = planned("--context-parallel-size", "4", world_size=4)
    predicted = predict_ranks(plan, range(4))
    measured = [
        [*rows, Held(kind=kinds.PEAK, num_bytes=2**20 * (rank + 1))]
        for rank, rows in enumerate(predicted)
    ]
    file = io.StringIO()
    report = MemoryReport(plan=plan, predicted=predicted, measured=measured)
    report.print(Console(file=file, width=width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for rank in range(4):
        assert f"rank {rank}" in text
        assert f"{rank + 1}.0000" in text
    (report,) = predict_report(plan)
    assert report.predicted == predicted


def test_the_worst_case_of_experts_is_named() -> None:
    """All tokens of four ranks may choose one rank's experts, of which there are two."""
    words = ["--num-experts", "8", "--moe-router-topk", "4", "--expert-model-parallel-size", "4"]
    plan = planned(*words, "--moe-ffn-hidden-size", "40", world_size=4)
    row = (H + 3 * 40) * 4 + 4 + 2 * 8  # tokens, wide tensors, the weight, two permutations
    balanced, most = expert_rows(plan)
    assert (balanced, most) == (B * S * 4 * row, 4 * B * S * 2 * row)
    said = " ".join(shown(plan).split())
    assert f"predicted to keep {balanced / 2**20:,.4f} MiB of tokens, as many on every" in said
    assert f"at worst, one rank keeps {most / 2**20:,.4f}" in said


def test_only_the_chosen_experts_compute() -> None:
    """Matrix parameters of a token: those of attention, the router, two experts and the head."""
    plan = planned("--num-experts", "8", "--moe-ffn-hidden-size", "40", "--num-layers", "3")
    spec = ModelSpec.of(plan.config.model, vocab_size=257, seq_length=S)
    layer = H * (64 + 2 * 32 + 64) + 8 * H + 2 * 3 * 40 * H
    assert spec.matmul_parameters() == L * layer + V * H
    assert spec.training_flops(num_tokens=5, num_pairs=0) == 30 * (L * layer + V * H)
