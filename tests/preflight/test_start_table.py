"""The start table: complete, and readable in 80 columns and in a file."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.preflight.check import check
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.start_table import print_start, shown_ranks


def planned(*argv: str) -> RunPlan:
    preset = [] if "--preset" in argv else ["--preset", "toy-gpt"]
    arguments = parse_arguments(["--dry-run", *preset, *argv])
    size = arguments.options.world_size
    return check(arguments.config, Launch(), dry_run=True, dry_run_world_size=size)


def shown(plan: RunPlan, width: int = 80, run: Path | None = None) -> str:
    file = io.StringIO()
    print_start(plan, run, Console(file=file, width=width))
    return file.getvalue()


GRID = ["--context-parallel-size", "2", "--tensor-parallel-size", "2"]


def test_the_table_of_an_ordinary_run() -> None:
    text = shown(planned(*GRID, "--world-size", "8"))
    for part in (
        "8 ranks = dp 2 x cp 2 x tp 2",
        "rank 6              dp 1  cp 1  tp 0   positions 256-511, 512-767",
        "toy-gpt: 4 layers of 128, 4 heads of 32",
        "973,568 in all",
        "1,024 per row, 512 of them on a rank",
        "auto (cpu: float32, cuda: bfloat16)",
        "PyTorch's fused CPU flash attention",
        "zigzag - chosen",
        "causal",
        "p2p, ring - moves the fewest bytes, a2a 1.3x",
        "4 rows = micro batch 2 x dp 2 x 1 accumulated",
        "optimizer           AdamW",
        "Python's standard library",
        "runs/toy-gpt-<n>",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()


def test_the_table_of_special_runs() -> None:
    argv = [*GRID, "--document-mask", "--window-size", "100", "0", "--deterministic"]
    text = shown(planned(*argv, "--seq-length", "1021", "--micro-batch-size", "1", "--pad-rows"))
    for part in (
        "causal, inside each document, 100 tokens back",
        "1,022 per row (1 of padding), 511 of them on a rank",
        "tp 0   positions differ from batch to batch",
        "balanced - chosen: it distributes each batch's",
        "exchange            auto - each batch takes what ranks wait for least",
        "deterministic       on",
        "rows of 1,021 tokens are padded to 1,022, a",
    ):
        assert part in text
    text = shown(planned(*GRID, "--window-size", "9", "0", "--window-layers", "0", "2"))
    assert "causal, 9 tokens back in layers 0 2" in text
    argv = ["--context-parallel-size", "4", "--cp-comm-type", "a2a+p2p", "--cp-route", "direct"]
    text = shown(planned(*argv, "--hierarchical-context-parallel-sizes", "2", "2"))
    assert "a2a+p2p 2 x 2, direct - asked for" in text
    argv = ["--context-parallel-size", "4", "--cp-comm-type", "p2p", "--cp-message-parts", "2"]
    assert "p2p, ring, messages in 2 parts - asked for" in shown(planned(*argv))


def test_the_table_names_muon() -> None:
    text = shown(planned("--optimizer", "muon", "--muon-num-ns-steps", "3"), width=120)
    assert "Muon for the matrices of layers (3 quintic iterations), AdamW for all else" in text


def test_the_model_is_told_where_it_differs_from_llama() -> None:
    argv = "--norm-placement both --geglu --embedding-multiplier 11.5 --final-logit-softcapping 30"
    argv += " --position-embedding-type rope --rotary-percent 0.5 --no-rope-layers 1 3"
    argv += " --window-size 8 0 --window-rotary-base 100 --attn-logit-softcapping 50"
    argv += " --qk-layernorm --qk-norm-scope all_heads --softmax-type learnable"
    text = shown(planned(*argv.split()), width=200)
    for part in (
        "LayerNorm around blocks, norms of all heads together, rope (16 channels of a head, base "
        "100 in windows, not in 2 of 4 layers), GEGLU 320",
        "embeddings x 11.5, logits capped at 30",
        "causal, 8 tokens back, scores capped at 50, learned sinks",
    ):
        assert part in text
    text = shown(planned("--preset", "toy-qwen3.5", "--device", "cpu"), width=200)
    assert "3 of 4 layers are gated DeltaNets (4 heads of 32 x 32 in 2 groups)" in text
    assert "gated output" in text
    assert "reference - PyTorch's own functions, block by block; not fla: runs on cuda" in text
    text = shown(planned("--multi-latent-attention", "--parallel-residual"), width=200)
    assert "4 heads of 192 (values 128) from latents of 512" in text
    assert "GELU 512 beside attention" in text


def test_a_known_device_has_one_kernel() -> None:
    text = shown(planned(*GRID).on_device("cpu", note="2 local ranks, no GPU"))
    assert "cpu, float32" in text
    assert "kernel on" not in text
    assert "2 local ranks, no GPU" in text


def test_big_worlds_show_their_first_and_last_ranks() -> None:
    text = shown(planned("--preset", "llama3-8b", *GRID, "--world-size", "512"))
    assert "rank 5 " in text
    assert "rank 6 " not in text
    assert "rank 511" in text
    assert shown_ranks(3) == [0, 1, 2]
    assert shown_ranks(100) == [0, 1, 2, 3, 4, 5, None, 99]


def test_paths_are_shown_as_they_are() -> None:
    plan = planned()
    assert "[bold]x" in shown(plan, run=Path("[bold]x"))
    assert max(map(len, shown(plan, run=Path("x" * 300)).splitlines())) <= 80


OWN = ["--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "4"]


def test_what_is_not_the_toy_is_not_called_toy() -> None:
    changed = shown(planned("--preset", "toy", "--num-layers", "40"))
    assert "toy, changed: 40 layers of 192" in changed
    assert "toy: 2 layers of 192" in shown(planned("--preset", "toy", "--lr", "1"))
    arguments = parse_arguments([*OWN, "--dry-run"])
    own = shown(check(arguments.config, Launch(), dry_run=True, notes=arguments.notes))
    assert "toy" not in own
    assert re.search("model +4 layers of 128, 4 heads of 32", own)
    assert "runs/megatron-<n>" in own
    assert "defaults are Megatron-LM's" in own


def test_the_table_of_a_mixture_of_experts() -> None:
    argv = ["--preset", "toy-moe", "--expert-model-parallel-size", "4"]
    more = ["--moe-layers", "1", "--moe-shared-expert-intermediate-size", "64"]
    more += ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"]
    text = shown(planned(*argv, *more), width=200)
    for part in (
        "4 ranks = dp 4 x cp 1 x tp 1, experts over ep 4",
        "positions 0-1023   experts 4-7",
        "sharded over dp x cp; experts over ep, then over all other ranks)",
        "16 experts of 128, 2 a token, a shared one of 64, in 1 of 2 layers",
        "routed by sigmoid with sum 1 x 2, seq_aux_loss x 0.02, biases moved by 0.001 a step",
        "SwiGLU 512",
    ):
        assert part in text
    whole = shown(planned("--preset", "qwen3-30b-a3b", "--vocab-size", "151936"), width=200)
    assert "30,532,122,624 in all, 3,353,032,704 for a token" in whole
