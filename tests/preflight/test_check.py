"""Impossible settings are refused before torch is imported, with values that work instead."""

from __future__ import annotations

import importlib.util
import math
import os
import pickle
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.errors import CombinedError, ConfigError
from cp_megatron.plan import Grid
from cp_megatron.preflight.check import check
from cp_megatron.preflight.run_plan import RunPlan

LLAMA = ["--preset", "toy"]
WINDOW = ["--window-size"]
CP2, CP8, TP4 = (
    ["--context-parallel-size", "2"],
    ["--context-parallel-size", "8"],
    ["--tensor-parallel-size", "4"],
)
PACKED = ["--document-mask", "--micro-batch-size", "2"]
MLA, PARTS = ["--multi-latent-attention"], ["--cp-message-parts", "2"]
HIERARCHY = "--hierarchical-context-parallel-sizes"
FULL = ["--recompute-granularity", "full"]
ROPE = ["--position-embedding-type", "rope"]
YARN = [*ROPE, "--rope-type", "yarn", "--rope-scaling-factor", "2"]


def plan(*argv: str, world: int = 1, local: int | None = None, torchrun: bool = True) -> RunPlan:
    """The plan of a real run: ``world`` ranks, started as torchrun or plain python does."""
    launch = Launch(world_size=world, local_world_size=local or world, under_torchrun=torchrun)
    # The GPT style preset, so that every flag of both styles has something to change.
    preset = [] if {"--preset", "--load"} & set(argv) else ["--preset", "toy-gpt"]
    arguments = parse_arguments([*preset, *argv])
    return check(
        arguments.config,
        launch,
        dry_run=arguments.options.dry_run,
        dry_run_world_size=arguments.options.world_size,
        given=arguments.given,
        argv=argv,
    )


def refused(
    *argv: str, world: int = 1, torchrun: bool = True, local: int | None = None
) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        plan(*argv, world=world, torchrun=torchrun, local=local)
    error = caught.value
    errors = error.errors if isinstance(error, CombinedError) else (error,)
    assert all(each.rule and "\n" not in str(each) for each in errors)
    return error


# --- what is refused


@pytest.mark.parametrize(
    ("argv", "world", "flag", "works"),
    [
        # negative or zero sizes
        (["--num-layers", "0"], 1, "--num-layers", "1"),
        (["--hidden-size", "-128"], 1, "--hidden-size", "1"),
        (["--ffn-hidden-size", "0"], 1, "--ffn-hidden-size", "1"),
        (["--num-attention-heads", "0"], 1, "--num-attention-heads", "1"),
        (["--num-query-groups", "0"], 1, "--num-query-groups", "1"),
        (["--kv-channels", "-1"], 1, "--kv-channels", "1"),
        (["--seq-length", "0"], 1, "--seq-length", "1"),
        (["--micro-batch-size", "0"], 1, "--micro-batch-size", "1"),
        (["--global-batch-size", "0"], 1, "--global-batch-size", "1"),
        (["--train-iters", "0"], 1, "--train-iters", "1"),
        (["--tensor-parallel-size", "0"], 1, "--tensor-parallel-size", "1"),
        (["--context-parallel-size", "-2"], 1, "--context-parallel-size", "1"),
        (["--log-interval", "0"], 1, "--log-interval", "1"),
        (["--eval-interval", "0"], 1, "--eval-interval", "1"),
        (["--save-interval", "0"], 1, "--save-interval", "1"),
        (["--lr-decay-iters", "0"], 1, "--lr-decay-iters", "1"),
        (["--eval-iters", "-1"], 1, "--eval-iters", "0"),
        (["--lr-warmup-iters", "-1"], 1, "--lr-warmup-iters", "0"),
        (["--seq-length", str(2**40)], 1, "--seq-length", str(2**31 - 1)),
        (["--make-vocab-size-divisible-by", "0"], 1, "--make-vocab-size-divisible-by", "1"),
        # numbers out of their range
        (["--lr", "0"], 1, "--lr", "0.0003"),
        (["--lr", "-1"], 1, "--lr", "0.0003"),
        (["--min-lr", "-1"], 1, "--min-lr", "0"),
        (["--weight-decay", "-0.1"], 1, "--weight-decay", "0"),
        (["--adam-beta1", "1"], 1, "--adam-beta1", "0.9"),
        (["--adam-beta2", "-0.1"], 1, "--adam-beta2", "0"),
        (["--adam-eps", "0"], 1, "--adam-eps", "1e-08"),
        (["--clip-grad", "-1"], 1, "--clip-grad", "0"),
        (["--hidden-dropout", "1"], 1, "--hidden-dropout", "0"),
        (["--attention-dropout", "1.5"], 1, "--attention-dropout", "0"),
        (["--norm-epsilon", "-1"], 1, "--norm-epsilon", "0"),
        (["--init-method-std", "0"], 1, "--init-method-std", "0.02"),
        ([*ROPE, "--rotary-base", "1"], 1, "--rotary-base", "10000"),
        (["--seed", "-1"], 1, "--seed", "0"),
        (["--distributed-timeout-minutes", "0"], 1, "--distributed-timeout-minutes", "0.01"),
        (["--distributed-timeout-minutes", "1e-9"], 1, "--distributed-timeout-minutes", "0.01"),
        ([*YARN, "--beta-fast", "1e308"], 1, "--beta-fast", "1e+30"),
        ([*YARN, "--beta-slow", "5e-324"], 1, "--beta-slow", "1e-30"),
        (["--window-size", "9" * 30, "0"], 1, "--window-size", ""),
        # memory
        (["--recompute-num-layers", "0"], 1, "--recompute-num-layers", "1"),
        (["--mlp-tile-size", "0"], 1, "--mlp-tile-size", "1"),
        (["--loss-chunk-size", "0"], 1, "--loss-chunk-size", "1"),
        (["--recompute-num-layers", "2"], 1, "--recompute-num-layers", "selective or full"),
        ([*FULL, "--recompute-num-layers", "5"], 1, "--recompute-num-layers", "4"),
        (["--cpu-offloading"], 1, "--cpu-offloading", "--recompute-granularity full"),
        (
            ["--recompute-keeps-attention", *FULL[:1], "selective"],
            1,
            "--recompute-keeps-attention",
            "full",
        ),
        (["--cpu-offloading", *FULL[:1], "selective"], 1, "--cpu-offloading", "full"),
        (["--z-loss-coeff", "-1"], 1, "--z-loss-coeff", "0"),
        # the learning rate
        (["--lr", "1e-4", "--min-lr", "2e-4"], 1, "--min-lr", "1e-05"),
        (["--lr-warmup-iters", "120"], 1, "--lr-warmup-iters", "12"),
        (["--lr-decay-iters", "5"], 1, "--lr-warmup-iters", "0"),
        # the world
        (["--tensor-parallel-size", "2"], 3, "--tensor-parallel-size", "--nproc-per-node 2 "),
        (["--kernel-benchmark", "--kernel", "cpu"], 1, "--kernel-benchmark", "--kernel auto"),
        (["--kernel-benchmark", "--deterministic"], 1, "--kernel-benchmark", "--kernel NAME"),
        (["--compile", "--memory-report"], 1, "--memory-report", "without --compile"),
        # the model
        (["--hidden-size", "130"], 1, "--hidden-size", "128, 132"),
        (["--num-query-groups", "3"], 1, "--num-query-groups", "1, 2, 4"),
        (["--num-query-groups", "8"], 1, "--num-query-groups", "1, 2, 4"),
        ([*ROPE, "--hidden-size", "12"], 1, "--hidden-size", "8, 16"),
        ([*ROPE, "--kv-channels", "5"], 1, "--kv-channels", "4, 6"),
        (["--max-position-embeddings", "512"], 1, "--max-position-embeddings", "1024"),
        ([*LLAMA, "--max-position-embeddings", "9"], 1, "--max-position-embeddings", "1024"),
        (["--rotary-base", "5"], 1, "--rotary-base", "--position-embedding-type rope"),
        # tensor parallelism
        (["--tensor-parallel-size", "3"], 3, "--tensor-parallel-size", "1, 2, 4"),
        (["--tensor-parallel-size", "8"], 8, "--tensor-parallel-size", "1, 2, 4"),
        (
            ["--tensor-parallel-size", "2", "--ffn-hidden-size", "9"],
            2,
            "--ffn-hidden-size",
            "8, 10",
        ),
        # the sequence
        ([*CP2, "--seq-length", "1023"], 2, "--seq-length", "1020, 1024, or --pad-rows"),
        ([*CP2, "--seq-length", "1022"], 2, "--seq-length", "1020, 1024, or --cp-layout contig"),
        (
            [*CP2, *PACKED, "--seq-length", "1023", "--cp-layout", "zigzag"],
            2,
            "--seq-length",
            "1022",
        ),
        (["--context-parallel-size", "4", "--seq-length", "3"], 4, "--seq-length", "8"),
        (["--window-size", "4", "1"], 1, "--window-size", "4 0"),
        (["--window-size", "-2", "0"], 1, "--window-size", "-1 0"),
        (["--window-layers", "0"], 1, "--window-layers", "--window-size LEFT 0"),
        ([*WINDOW, "-1", "0", "--window-layers", "0"], 1, "--window-layers", "--window-size LEFT"),
        ([*WINDOW, "9", "0", "--window-layers", "0", "4"], 1, "--window-layers", "0 2"),
        ([*WINDOW, "9", "0", "--window-layers=-1"], 1, "--window-layers", "0 2"),
        ([*WINDOW, "9", "0", "--window-layers", "2", "0", "2"], 1, "--window-layers", "0 2"),
        # exchanges
        ([*CP8, "--cp-comm-type", "a2a"], 8, "--cp-comm-type", "a2a+p2p --hierarchical-context"),
        ([*CP2, *TP4, "--cp-comm-type", "a2a"], 8, "--cp-comm-type", "--cp-comm-type p2p"),
        ([*CP2, "--cp-comm-type", "a2a+p2p"], 2, HIERARCHY, "1 2 or 2 1"),
        ([*CP8, "--cp-comm-type", "a2a+p2p", HIERARCHY, "8", "1"], 8, "--cp-comm-type", "p2p"),
        ([*CP8, "--cp-comm-type", "a2a+p2p", HIERARCHY, "2", "2"], 8, HIERARCHY, "2 4 or 4 2"),
        ([*CP8, "--cp-comm-type", "p2p", HIERARCHY, "2", "4"], 8, HIERARCHY, "a2a+p2p"),
        (
            [*CP2, "--cp-comm-type", "a2a", "--cp-route", "ring"],
            2,
            "--cp-route",
            "--cp-comm-type p2p",
        ),
        ([*CP2, *TP4, "--cp-message-parts", "2"], 8, "--cp-message-parts", "1"),
        ([*CP2, "--cp-comm-type", "allgather", *PARTS], 2, "--cp-message-parts", "p2p or a2a+p2p"),
        ([*CP2, *MLA, *PARTS], 2, "--cp-message-parts", "--cp-latent-exchange expanded"),
        # the batch
        (["--global-batch-size", "6"], 4, "--global-batch-size", "4, 8"),
        (["--micro-batch-size", "3"], 1, "--global-batch-size", "3, 6"),
        # data and validation
        (["--tokenizer-model", "t"], 1, "--tokenizer-model", "leave it out"),
        (["--tokenizer-type", "tiktoken"], 1, "--tokenizer-type", "--tokenizer-model FILE"),
        (["--data-path", "0.7", "a", "b"], 1, "--data-path", "0.7 FIRST 0.3 SECOND"),
        (["--data-path", "0", "a", "1", "b"], 1, "--data-path", "1 a"),
        (["--data-path", "none.idx"], 1, "--data-path", ""),
        (["--train-data-path", "a", "--split", "1"], 1, "--split", "leave it out"),
        (["--train-data-path", "a", "--data-path", "b"], 1, "--data-path", "one of the two"),
        (["--valid-data-path", "a"], 1, "--valid-data-path", "--train-data-path"),
        (["--packing", "best-fit", "--no-document-mask"], 1, "--no-document-mask", "concatenate"),
        (["--sft", "--packing", "concatenate"], 1, "--packing", "best-fit"),
        (["--sft"], 1, "--data-path", ".jsonl"),
        (["--skip-bad-lines"], 1, "--skip-bad-lines", "leave it out"),
        (["--split", "1,2,3,4"], 1, "--split", ""),
        (["--split", "0,1,1"], 1, "--split", ""),
        (["--split", "-1,1,1"], 1, "--split", ""),
        (["--split", "a"], 1, "--split", ""),
        # kernels
        (["--attention-dropout", "0.1", "--kernel", "cpu"], 1, "--kernel", "--attention-dropout 0"),
        (["--attention-dropout", "0.1", "--dtype=float64", "--kernel=cpu"], 1, "--kernel", "auto"),
        (
            ["--kernel", "cudnn", "--window-size", "9", "0", "--bf16"],
            1,
            "--kernel",
            "--kernel cuda",
        ),
        (["--kernel", "cudnn", "--deterministic", "--bf16"], 1, "--kernel", "--kernel cuda"),
        (["--kernel", "cuda", "--device", "cpu"], 1, "--kernel", "--kernel cpu"),
        (["--kernel=cpu", "--attn-logit-softcapping=50"], 1, "--kernel", "--kernel reference"),
        (["--kernel", "cuda", "--dtype", "float64"], 1, "--kernel", "--kernel reference"),
        # places
        (["--load", "no-such-run"], 1, "--load", ""),
        (["--data-path", "no-such-file"], 1, "--data-path", ""),
    ],
)
def test_refusals(argv: list[str], world: int, flag: str, works: str) -> None:
    error = refused(*argv, world=world)
    assert error.flag == flag
    assert works in error.works


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="the package is installed"
)
def test_flash_attn_asked_for_and_not_installed() -> None:
    error = refused("--kernel", "flash_attn")
    assert (error.flag, error.value) == ("--kernel", "flash_attn")
    assert "not installed" in error.rule


def test_a_softcap_chooses_a_kernel_that_has_it() -> None:
    choice = plan("--device", "cpu", "--attn-logit-softcapping", "50").kernels["cpu"]
    assert choice.name == "reference"
    assert "not cpu: has no softcap of the scores" in choice.reason


def test_key_value_heads_that_neither_divide_nor_are_divided() -> None:
    heads = ["--num-attention-heads", "12", "--num-query-groups", "3", "--hidden-size", "96"]
    error = refused(*heads, "--tensor-parallel-size", "2", world=2)
    assert error.flag == "--tensor-parallel-size"
    assert error.works == "1, 3, 6, 12"
    assert plan(*heads, "--tensor-parallel-size", "6", world=6).grid.tp == 6


def test_a_vocabulary_that_tensor_parallelism_cannot_split() -> None:
    heads = ["--num-attention-heads", "5", "--hidden-size", "80", "--ffn-hidden-size", "320"]
    error = refused(*heads, "--tensor-parallel-size", "5", world=5)
    assert (error.flag, error.value) == ("--make-vocab-size-divisible-by", 128)
    argv = [*heads, "--tensor-parallel-size", "5", "--make-vocab-size-divisible-by", error.works]
    assert plan(*argv, world=5).padded_vocab_size % 5 == 0


def test_what_an_error_recommends_works() -> None:
    sp = ["--tensor-parallel-size", "4", "--context-parallel-size", "2", "--sequence-parallel"]
    error = refused(*sp, "--seq-length", "1020", world=8)
    assert error.flag == "--seq-length"
    *lengths, last = error.works.split(", ")
    assert last == "or --pad-rows"
    assert plan(*sp, "--seq-length", "1020", "--pad-rows", world=8).sequence.padding == 4
    for length in lengths:
        assert plan(*sp, "--seq-length", length, world=8).sequence.row_length == int(length)
    error = refused(*CP8, "--cp-comm-type", "a2a", world=8)
    works = error.works.split(" or ")[0].split()
    assert plan(*CP8, *works, world=8).sequence.sizes == (4, 2)


@pytest.mark.parametrize("torchrun", [False, True])
def test_the_error_for_a_small_world_has_the_whole_command(torchrun: bool) -> None:
    argv = ["--context-parallel-size", "2", "--tensor-parallel-size", "2", "--save", "my run"]
    error = refused(*argv, torchrun=torchrun)
    assert f"{error.flag} {error.value}" == "--context-parallel-size 2 x --tensor-parallel-size 2"
    command = ["torchrun", "--nproc-per-node", "4", "launch/pretrain.py", *argv]
    assert shlex.split(error.works) == command


def test_the_error_for_several_nodes_has_the_sizes() -> None:
    error = refused("--tensor-parallel-size", "4", world=6, local=3)
    assert error.works == "4, 8 ranks over all nodes"


def test_copies_of_the_model_divide_data_parallelism() -> None:
    copies = ["--data-parallel-replicate-size", "2"]
    grid = Grid(dp=4, cp=2, replicas=2)
    assert plan(*copies, "--context-parallel-size", "2", world=8).grid == grid
    assert grid != Grid(dp=4, cp=2)
    assert plan(*copies, "--dry-run", torchrun=False).grid == Grid(dp=2, replicas=2)
    error = refused(*copies, "--context-parallel-size", "2", world=6)
    assert (error.flag, error.value) == (
        "--data-parallel-replicate-size 2 x --context-parallel-size",
        "2",
    )
    assert error.rule == "needs a multiple of 4 ranks, but torchrun started 6"


def test_the_world_of_a_dry_run() -> None:
    tp = ["--dry-run", "--tensor-parallel-size", "4"]
    assert plan(*tp, "--world-size", "8").grid == Grid(dp=2, tp=4)
    assert plan(*tp, torchrun=False).grid == Grid(tp=4)
    error = refused(*tp, "--world-size", "10")
    assert (error.flag, error.works) == ("--world-size", "8, 12")
    assert refused("--dry-run", "--world-size", "0").flag == "--world-size"


def test_data_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("text")
    for name in ("empty.txt", "picture.txt", "folder"):
        assert refused("--data-path", str(tmp_path / name)).flag == "--data-path"
    assert plan("--data-path", str(tmp_path / "text.txt"))


# --- what is worked out


def test_everything_derived_is_filled_in() -> None:
    run = plan(*LLAMA, "--context-parallel-size", "2", "--global-batch-size", "8", world=4)
    assert run.grid == Grid(dp=2, cp=2)
    assert (run.num_microbatches, run.config.data.global_batch_size) == (1, 8)
    sequence = run.sequence
    assert (sequence.layout.kind, sequence.layout.shard_len) == ("zigzag", 512)
    assert (sequence.row_length, sequence.padding) == (1024, 0)
    assert (sequence.exchange, run.load, run.load_step) == ("p2p", None, 0)
    assert (run.vocab_size, run.padded_vocab_size) == (257, 384)


def test_a_batch_of_one_micro_batch_per_rank_by_default() -> None:
    run = plan("--global-batch-size", "None", "--micro-batch-size", "3", world=2)
    assert (run.config.data.global_batch_size, run.num_microbatches) == (6, 1)


def test_sequence_parallel_without_tensor_parallel_is_off_with_a_note() -> None:
    run = plan("--sequence-parallel")
    assert not run.config.parallel.sequence_parallel
    assert "--sequence-parallel is off" in run.notes[0]


@pytest.mark.parametrize("flags", [[], ["--eval-iters", "2", "--eval-interval", "5"]])
def test_a_missing_validation_part_is_noted(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("three blind mice")
    for data in (["--split", "100,0,0"], ["--train-data-path", str(tmp_path / "text.txt")]):
        run = plan(*data, *flags)
        assert run.config.train.eval_iters == 0
        assert "no validation part: nothing is validated" in run.notes[0]


def test_an_interval_without_a_validation_is_noted() -> None:
    run = plan("--eval-iters", "0", "--eval-interval", "5")
    assert run.notes == ("--eval-interval 5 has no effect: --eval-iters 0 validates nothing",)


def test_the_device_waits_for_torch_where_it_must() -> None:
    run = plan()
    assert (run.device, run.dtype, run.kernel) == (None, None, None)
    assert set(run.kernels) == {"cpu", "cuda"}
    on_cpu = run.on_device("cpu", note="no GPU was found")
    assert (on_cpu.device, on_cpu.dtype) == ("cpu", "float32")
    assert on_cpu.kernel == run.kernels["cpu"]
    assert on_cpu.notes == ("no GPU was found",)
    assert run.on_device("cuda").dtype == "bfloat16"
    known = plan("--device", "cpu", "--bf16")
    assert (known.device, known.dtype) == ("cpu", "bfloat16")


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("--device", "cuda").on_device("cpu")
    assert (caught.value.flag, caught.value.works) == ("--device", "--device cpu")


def test_a_length_that_is_no_number_in_code() -> None:
    config = parse_arguments([]).config
    config = replace(config, optimizer=replace(config.optimizer, lr=math.nan))
    with pytest.raises(ConfigError, match="--lr nan"):
        check(config, Launch())


def test_a_short_run_of_a_preset_with_a_longer_warm_up() -> None:
    assert plan("--train-iters", "3").config.optimizer.lr_warmup_iters == 10


def test_the_micro_batch_is_by_default_a_rank_s_whole_share() -> None:
    for world in (1, 2, 4):
        run = plan("--global-batch-size", "8", world=world)
        assert (run.micro_batch_size, run.num_microbatches) == (8 // world, 1)
    both = ["--global-batch-size", "8", "--micro-batch-size", "2"]
    assert plan(*both, world=2).num_microbatches == 2
    assert refused("--global-batch-size", "6", world=4).works == "4, 8"


def test_presets_are_possible_runs() -> None:
    for preset in ("toy", "toy-gpt", "gpt2-small", "llama-1b", "llama3-8b"):
        argv = ["--preset", preset, "--dry-run", "--world-size", "16"]
        argv += ["--context-parallel-size", "2", "--tensor-parallel-size", "2"]
        assert plan(*argv, "--global-batch-size", "16").grid == Grid(dp=4, cp=2, tp=2)


def test_what_saves_memory_is_possible_together() -> None:
    memory = plan(*FULL, "--recompute-num-layers", "4", "--cpu-offloading").config.memory
    assert (memory.recompute_num_layers, memory.cpu_offloading) == (4, True)


def test_a_plan_crosses_a_process_boundary() -> None:
    run = plan(*LLAMA)
    assert pickle.loads(pickle.dumps(run)) == run


def test_check_creates_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan("--save", "deep/run")
    assert not os.listdir(tmp_path)


def test_rules_that_are_broken_independently_are_told_together() -> None:
    with pytest.raises(CombinedError) as caught:
        plan(
            *("--num-query-groups", "3", "--global-batch-size", "3", "--min-lr", "7"),
            *("--data-path", "missing", "--recompute-num-layers", "2"),
            world=2,
        )
    flags = [error.flag for error in caught.value.errors]
    expected = ["--num-query-groups", "--recompute-num-layers", "--global-batch-size"]
    assert flags == [*expected, "--min-lr", "--data-path"]
    assert len(str(caught.value).splitlines()) == 5
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.flag) == (str(caught.value), "--num-query-groups")


def test_a_mistake_that_may_follow_from_another_is_not_told() -> None:
    # Two ranks cannot share the heads of a model whose number of heads is refused.
    error = refused("--num-query-groups", "3", "--tensor-parallel-size", "2", world=2)
    assert type(error) is ConfigError
    earlier = ConfigError("--global-batch-size", "x", "must be a whole number")
    config = parse_arguments(["--preset", "toy-gpt", "--global-batch-size", "3"]).config
    with pytest.raises(ConfigError) as caught:
        check(config, Launch(world_size=2), mistakes=(earlier,))
    assert caught.value is earlier
