"""``python -m cp_megatron.plan``: what it prints, draws and refuses, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from cp_megatron.plan.__main__ import main
from cp_megatron.plan.exchange import EXCHANGES, LATENT_EXCHANGES, ROUTES
from cp_megatron.plan.layout import KINDS
from cp_megatron.plan.show.command import PlanOptions, make_schedule, parse, random_lengths
from cp_megatron.plan.show.text import in_bytes

ROOT = Path(__file__).parents[3]

SHARES = """\
mask      causal; 8 tokens, 36 pairs (56.25%)
layout    zigzag on 2 ranks, 4 tokens each
exchange  p2p over the ring; moves the fewest bytes, a2a 3.3x
route     ring; all ranks together receive 6 (ring) or 6 (direct) keys
heads     32 query, 8 key/value

rank  holds     pairs        of mean  keys received  bytes received
   0  0-1, 6-7     18          1.000              4        16.0 KiB
   1  2-5          18          1.000              2         8.0 KiB
 all               36  1.000 at most              6        24.0 KiB
"""

ROUNDS = """
rank 0 holds 4 tokens: 0-1, 6-7
round 0   own keys
  computes  queries 0-1, 6-7 x keys 0-1, 6-7, causal, 10 pairs
  sends     keys 0-1 (2) to rank 1
  receives  keys 2-5 (4) from rank 1, for round 1
round 1   keys of rank 1: 2-5 (4)
  computes  queries 6-7 x keys 2-5, full, 8 pairs
  backward  returns the gradients of 4 keys to rank 1, gets back gradients of 2 keys from rank 1
"""

STATES = """
states    4 heads; 3 pieces, 1 chains, 3 pieces in the longest
messages  2 that wait for each other, forward and backward
halo      4 tokens travel to convolutions

rank  states in  states out  transitions  halo  chains of heads  bytes received  in backward
   0          1           1            0     2              0-1           272 B        256 B
   1          1           1            1     2              2-3           256 B        256 B
 all          2           2            1     4                            528 B        512 B
"""

PIPELINE = """\
pipeline  1F1B, 2 stages, 4 micro batches
bubble    20.0% of the time, if a backward pass takes as long as two forward passes
passes    F3 is the forward pass of micro batch 3, B a backward pass

stage  waits  in flight  sent  received
    0  20.0%          2     4         4
    1  20.0%          1     4         4

stage 0   F0-1  B0 F2 B1 F3  B2-3
stage 1   F0 B0 ... F3 B3
"""

CHUNKS = """\
pipeline  interleaved 1F1B, 2 stages of 2 chunks each, 3 micro batches
bubble    14.3% of the time, if a backward pass takes as long as two forward passes
passes    F3.1 is the forward pass of micro batch 3 through chunk 1 of the stage, B a backward pass

stage  waits  in flight  sent  received
    0  14.3%          6     9         9
    1  14.3%          4     9         9

stage 0   F0-2.0  F0-2.1  B0-2.1  B0-2.0
stage 1   F0-2.0  F0.1 B0.1 ... F2.1 B2.1  B0-2.0
"""


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert not err
    return "\n".join(line.rstrip() for line in out.splitlines()) + "\n"


def test_two_ranks_literally(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--seq-length", "8", "--context-parallel-size", "2"]
    assert printed(capsys, *argv) == SHARES
    assert printed(capsys, *argv, "--rank", "0") == SHARES + ROUNDS


def test_a_pipeline_literally(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stages = ["--pipeline-model-parallel-size", "2"]
    assert printed(capsys, *stages) == PIPELINE
    chunks = ["--num-microbatches", "3", "--num-virtual-stages-per-pipeline-rank", "2"]
    assert printed(capsys, *stages, *chunks) == CHUNKS
    path = tmp_path / "pipeline.svg"
    out = printed(capsys, *stages, "--svg", str(path))
    assert out == f"{PIPELINE}\npicture   {path}\n"
    assert path.read_text().startswith("<svg")


def test_a_recurrence_needs_its_heads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--linear-conv-kernel-dim", "4"]) == 2
    assert "--linear-conv-kernel-dim 4: describes a recurrence" in capsys.readouterr().err


def test_both_pictures_are_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    assert main(["--linear-num-value-heads", "4", "--svg", str(path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"plan.svg", "plan-states.svg"}
    assert f"picture   {tmp_path / 'plan-states.svg'}" in capsys.readouterr().out


def test_states_literally(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--seq-length", "8", "--context-parallel-size", "2", "--linear-num-value-heads", "4"]
    widths = ["--linear-key-head-dim", "2", "--linear-value-head-dim", "8"]
    widths += ["--linear-conv-kernel-dim", "3", "--linear-transition", "vector"]
    assert printed(capsys, *argv, *widths) == SHARES + STATES


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["--cp-comm-type", "all_gather", "--seq-length", "8", "--window", "2", "-1",
          "--cp-layout", "contiguous", "--rank", "2"],
         ["mask      causal, window 2 left; 8 tokens, 21 pairs (32.81%)",
          "exchange  all_gather; asked for",
          "  gathers   gives 4-5 (2), padded to 2 tokens",
          "            picks 2 of the 8 gathered",
          "round 1   keys of all others: 2-3",
          "  computes  queries 4-5 x keys 2-3, window, 3 pairs"]),
        (["--cp-comm-type", "a2a+p2p", "--hierarchical-context-parallel-sizes", "2", "2",
          "--num-attention-heads", "6", "--num-query-groups", "3", "--seq-length", "8",
          "--head-dim", "8", "--v-head-dim=4", "--dtype", "float32", "--rank", "3"],
         ["exchange  a2a among 2, p2p over the ring between 2 groups; asked for",
          "   3  3-4       18          1.000              4           672 B  q 3-5, kv 1-2",
          "  heads     exchanged for tokens with ranks 2-3",
          "            rank 2 gets q 0-2, kv 0-1 of this rank's tokens, gives q 3-5, kv 1-2",
          "round 0   keys of its group",
          "round 1   keys of group 0: 0-1 (2)"]),
        (["--latent", "512", "64", "--head-dim", "192", "--v-head-dim", "128", "--seq-length", "8",
          "--context-parallel-size", "2", "--num-attention-heads", "16"],
         ["exchange  p2p of latents over the ring; moves the fewest bytes, p2p 8.9x, a2a 12x",
          "heads     16 query, 16 key/value",
          "latent    512 + 64 elements a token travel; readers expand the heads",
          "   0  0-1, 6-7     18          1.000              4         4.5 KiB"]),
        (["--documents", "1", "1", "1", "1", "--context-parallel-size", "4", "--rank", "1",
          "--cp-route", "ring", "--cp-layout", "contiguous"],
         ["mask      documents: 4 of 1 to 1 tokens; 4 tokens, 4 pairs (25.00%)",
          "exchange  p2p over the ring; moves nothing, a2a some",
          "rounds 1-3   nothing"]),
        (["--documents", "3", "5", "--bidirectional", "--window", "-1", "1",
          "--cp-layout", "contiguous", "--context-parallel-size", "1"],
         ["mask      documents: 2 of 3 to 5 tokens, both directions, window 1 right; 8 tokens, "
          "27 pairs (42.19%)",
          "layout    contiguous on 1 rank, 8 tokens each",
          "exchange  p2p over the ring; one rank exchanges nothing"]),
        (["--mask", "full", "--seq-length", "256", "--context-parallel-size", "2"],
         ["mask      full; 256 tokens, 65,536 pairs (100.00%)",
          "   0  0-127    32,768          1.000            128       512.0 KiB"]),
    ],
)  # fmt: skip
def test_lines(argv: list[str], lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, *argv).splitlines()
    assert [line for line in lines if line not in found] == [], "\n".join(found)


def test_it_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.svg"
    out = printed(capsys, "--documents-random", "1", "--seq-length", "8192", "--svg", str(path))
    assert out.endswith(f"\npicture   {path}\n")
    assert path.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--seq-lenght", "4"], "--seq-lenght 4: unknown flag (works: --seq-length, --latent)"),
        (["--seq_length=4"], "--seq_length 4: unknown flag (works: --seq-length)"),
        (["4096"], "argument 4096: belongs to no flag (works: --flag value)"),
        (["--seq-length"], "--seq-length: needs one value (works: --seq-length INT)"),
        (["--seq-length", "x"], "--seq-length x: must be a whole number"),
        (["--seq-length", "0"], "--seq-length 0: must be at least 1"),
        (["--seq-length", "8", "--seq-length", "9"],
         "--seq-length 9: contradicts --seq-length 8"),
        (["--seq-length", "10"], "--seq-length 10: the zigzag layout on 4 context parallel ranks"),
        (["--window", "3"], "--window 3: needs 2 values"),
        (["--window", "-2", "0"], "--window -2: must be at least -1 (works: -1)"),
        (["--documents"], "--documents: needs one or more values"),
        (["--documents", "4", "0"], "--documents 0: must be at least 1 (works: 1)"),
        (["--documents", "4", "4", "--seq-length", "9"],
         "--seq-length 9: the documents add up to 8 (works: 8, or leave it out)"),
        (["--mask", "documents"], "--mask documents: needs the lengths of the documents"),
        (["--mask", "causal", "--documents", "8"], "--mask causal: has no documents"),
        (["--documents", "8", "--documents-random", "1"],
         "--documents-random 1: cannot be combined with --documents"),
        (["--documents-random", "-1"], "--documents-random -1: must be at least 0"),
        (["--bidirectional"], "--bidirectional: contradicts a causal mask (works: --mask full)"),
        (["--bidirectional", "maybe"], "--bidirectional maybe: is a switch, which only true or"),
        (["--mask", "cubist"],
         "--mask cubist: must be one of its choices (works: causal, full, documents)"),
        (["--context-parallel-size", "0"], "--context-parallel-size 0: must be at least 1"),
        (["--head-dim", "0"], "--head-dim 0: must be at least 1"),
        (["--v-head-dim", "0"], "--v-head-dim 0: must be at least 1"),
        (["--num-query-groups", "5"], "--num-query-groups 5: must divide the 32 query heads"),
        (["--rank", "4"], "--rank 4: is not a rank of --context-parallel-size (works: 0 to 3)"),
        (["--num-microbatches", "8"],
         "--num-microbatches 8: is of a pipeline (works: --pipeline-model-parallel-size 4 with"),
        (["--num-virtual-stages-per-pipeline-rank", "1"],
         "--num-virtual-stages-per-pipeline-rank 1: is of a pipeline"),
        (["--pipeline-model-parallel-size", "0"],
         "--pipeline-model-parallel-size 0: must be at least 1"),
        (["--pipeline-model-parallel-size", "2", "--context-parallel-size", "4"],
         "--context-parallel-size 4: is of attention, and --pipeline-model-parallel-size shows a "
         "pipeline instead (works: one of the two: --context-parallel-size or --pipeline-model"),
        (["--no-bidirectional", "--pipeline-model-parallel-size", "2"],
         "--no-bidirectional: is of attention"),
        (["--pipeline-model-parallel-size", "2", "--svg", "no/such/folder/a.svg"],
         "--svg no/such/folder/a.svg: cannot be written: No"),
        (["--svg", "no/such/folder/a.svg"], "--svg no/such/folder/a.svg: cannot be written: No"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    (found,) = err.splitlines()
    assert found.startswith(f"python -m cp_megatron.plan: error: {line}")


def test_the_choices_are_those_of_the_plan() -> None:
    hints = get_type_hints(PlanOptions)
    assert get_args(hints["cp_comm_type"]) == ("auto", *EXCHANGES)
    assert get_args(hints["cp_route"]) == ("auto", *ROUTES)
    assert get_args(hints["cp_latent_exchange"]) == LATENT_EXCHANGES
    assert {"auto", *KINDS} <= set(get_args(hints["cp_layout"]))


def test_random_documents_fill_the_row_with_the_bars_lengths() -> None:
    lengths = random_lengths(1 << 22, 0)
    assert sum(lengths) == 1 << 22
    assert 2500 < sorted(lengths)[len(lengths) // 2] < 3500
    assert lengths == random_lengths(1 << 22, 0) != random_lengths(1 << 22, 1)
    assert random_lengths(1, 3) == [1]
    schedule = make_schedule(parse(["--documents-random", "3", "--seq-length", "4096"]))
    assert schedule.mask.lengths == tuple(random_lengths(4096, 3))


def test_bytes_are_formatted() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30)] == [
        "0 B", "1,023 B", "1.5 KiB", "3.0 MiB", "5.0 GiB",
    ]  # fmt: skip


def test_it_starts_without_torch_and_helps() -> None:
    code = (
        "import sys; from cp_megatron.plan.__main__ import main\n"
        "main(['--context-parallel-size', '64'])\n"
        "assert 'torch' not in sys.modules\n"
        "main(['--help'])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    for name in get_type_hints(PlanOptions):
        assert f"--{name.replace('_', '-')}" in ended.stdout
    assert "Also print the rounds of this rank" in ended.stdout
