"""launch/evaluate.py as a program, on one rank and on two, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist
from torch import nn

from cp_megatron.checkpoint.hf_export import export_hf
from cp_megatron.cli.parse import parse_arguments
from cp_megatron.cli.programs import EVALUATE, EvaluationOptions
from cp_megatron.comm.runtime import Launch
from cp_megatron.comm.signals import StopRequest
from cp_megatron.config.files.folder_lock import FolderLock
from cp_megatron.config.files.yaml_io import overlay
from cp_megatron.errors import ConfigError
from cp_megatron.evaluate import run_evaluation as evaluation_run
from cp_megatron.evaluate.check_evaluation import EvaluationSetup, check_evaluation
from cp_megatron.evaluate.results import EvaluationResults
from cp_megatron.evaluate.run_evaluation import evaluate
from cp_megatron.metrics import plots
from cp_megatron.model.transformer import Transformer
from cp_megatron.plan import Grid
from tests.launch.test_end_to_end import Ended, ours_in_trace, run
from tests.ranks import run_ranks
from tests.train.test_loop import train

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "evaluate.py")
FLAGS = ["--lengths", "600", "750", "--num-samples", "2", "--depths", "0", "50", "--buckets", "4"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("evaluated")
    lines = (f"Number {i} is here. The {i % 7} mice run after line {i * i}!" for i in range(400))
    (folder / "text.txt").write_text("\n".join(lines))
    argv = ["--preset", "toy", "--num-layers", "1", "--hidden-size", "32"]
    argv += ["--seq-length", "64", "--train-iters", "2"]
    argv += ["--data-path", str(folder / "text.txt"), "--save", str(folder / "run")]
    argv += ["--device", "cpu", "--no-plot", "--split", "80,20"]
    run_ranks(train, 1, argv)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[Ended, dict[str, Any]]:
    ended = run([sys.executable, SCRIPT, "--load", "run", *FLAGS, "--output", "alone"], folder)
    assert (ended.code, ended.err) == (0, ""), ended.err
    return ended, json.loads((folder / "alone" / "results.json").read_text())


def test_results_and_pictures_are_written(folder: Path, alone: tuple[Ended, Any]) -> None:
    ended, results = alone
    assert "perplexity by position" in ended.out
    assert "needle: exact answers" in ended.out
    for name in ("perplexity", "needle", "variables"):
        assert (folder / "alone" / f"{name}.png").read_bytes().startswith(PNG)
    assert [row["length"] for row in results["perplexity"]] == [600, 750]
    for row in results["perplexity"]:
        assert row["tokens"] == row["rows"] * row["length"]
        assert sum(b["tokens"] for b in row["buckets"]) == row["tokens"]
        loss = sum(b["loss"] * b["tokens"] for b in row["buckets"]) / row["tokens"]
        assert loss == pytest.approx(row["loss"], rel=1e-12)
        assert 3 < row["loss"] < 7
    assert len(results["answers"]) == 2 * (2 * 2 + 2)
    assert [cell["depth"] for cell in results["cells"]] == [0, 50, 0] * 2


def near(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(near, one, other))
    return one == (pytest.approx(other, rel=1e-4) if isinstance(other, float) else other)


def test_two_ranks_have_the_same_results(folder: Path, alone: tuple[Ended, Any]) -> None:
    command = ["torchrun", "--nproc-per-node", "2", SCRIPT, "--load", "run", *FLAGS]
    command += ["--context-parallel-size", "2", "--output", "two", "--no-plot"]
    ended = run(command, folder)
    assert (ended.code, ours_in_trace(ended)) == (0, []), ended.err
    assert "rows of 750 tokens are padded to 752" in ended.out
    found = json.loads((folder / "two" / "results.json").read_text())
    assert sorted(path.name for path in (folder / "two").iterdir()) == ["results.json"]
    assert found.pop("grid") == {"pp": 1, "dp": 1, "cp": 2, "tp": 1}
    assert near(found, {key: value for key, value in alone[1].items() if key != "grid"})


def planned(folder: Path, *argv: str) -> EvaluationSetup:
    argv = ["--load", str(folder / "run"), "--output", str(folder / "new"), *FLAGS, *argv]
    arguments = parse_arguments(argv, program=EVALUATE)
    options = cast(EvaluationOptions, arguments.options)
    return check_evaluation(arguments.config, options, Launch(), given=arguments.given)


def test_a_run_on_stages_is_evaluated_without_stages(folder: Path) -> None:
    argv = ["--load", str(folder / "run"), "--output", str(folder / "new"), *FLAGS]
    arguments = parse_arguments(argv, program=EVALUATE)
    stages = {"pipeline_parallel_size": 2, "pipeline_model_parallel_layout": "Et|L"}
    config = overlay(arguments.config, stages)
    options = cast(EvaluationOptions, arguments.options)
    setup = check_evaluation(config, options, Launch(), given=arguments.given)
    assert setup.longest.grid == Grid()
    assert setup.longest.stages.num_stages == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "1"], "--lr: has no effect on an evaluation"),
        (["--seq-length", "64"], "--seq-length: has no effect .*works: --lengths"),
        (["--save", "x"], "--save: has no effect"),
        (["--train-iters", "7"], "--train-iters: has no effect"),
        (["--profile"], "--profile: has no effect"),
        (["--sequence-parallel"], "--sequence-parallel: has no effect"),
        (["--compile"], "--compile: has no effect"),
        (["--kernel-benchmark"], "--kernel-benchmark: has no effect"),
        (
            ["--pipeline-model-parallel-size", "2"],
            "--pipeline-parallel-size: has no .*any checkpoint loads on a grid without pipeline",
        ),
        (["--pipeline-model-parallel-layout", "EtL"], "layout: has no effect on an evaluation"),
        (["--fsdp-reshard", "never"], "--fsdp-reshard: has no effect on an evaluation"),
        (["--moe-aux-loss-coeff", "1"], "--moe-aux-loss-coeff: has no effect on an evaluation"),
        (["--hidden-size", "64"], "is of another model"),
        (["--dtype", "float64"], "--dtype float64: the checkpoint's weights are float32"),
        (["--context-parallel-size", "2"], "torchrun --nproc-per-node 2"),
        (["--tasks", "perplexity,needles"], "--tasks needles: must be one of .*needle, variables"),
        (["--tasks", "needle"], "--buckets: has no effect without the task perplexity"),
    ],
)
def test_refused(folder: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(folder, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lengths", "60"], "--lengths 60: needle needs .*tokens for its question"),
        (["--lengths", "1", "--tasks", "perplexity"], "--lengths 1: must be at least 2"),
        (["--depths", "101"], "--depths 101: must be at least 0 and at most 100 .works: 100"),
        (["--output", "run"], "--output run: exists already"),
        (["--output", "run/config.yaml/x"], "run/config.yaml is a file, not a folder"),
        (["--output", "x" * 300], "a name in it is longer than"),
    ],
)
def test_refused_in_one_line(folder: Path, argv: list[str], message: str) -> None:
    ended = run([sys.executable, SCRIPT, "--load", "run", *argv], folder)
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("evaluate.py: error: ")
    assert re.search(message, line), line


def test_results_that_cannot_be_written_are_printed_and_the_exit_code_is_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(folder)
    (folder / "taken").write_text("")
    about = {"model": "m", "stopped_by": None}
    results = EvaluationResults(about=about, perplexity=(), answers=())
    assert not evaluation_run._show(plan, results, folder / "taken" / "x")
    message = capsys.readouterr().err
    assert message.startswith("evaluate.py: error: --output ")
    assert "cannot be written" in message


def test_a_model_is_needed(tmp_path: Path) -> None:
    arguments = parse_arguments([], program=EVALUATE)
    options = cast(EvaluationOptions, arguments.options)
    with pytest.raises(ConfigError, match="needs a trained model"):
        check_evaluation(arguments.config, options, Launch(), given=arguments.given)


def test_pictures_need_matplotlib_or_no_plot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'cp_megatron\[plot\]', or --no-plot"):
        planned(folder)
    assert not planned(folder, "--no-plot").plot


def test_rotary_settings_can_be_changed(folder: Path) -> None:
    plan = planned(folder, "--rotary-base", "50000", "--tasks", "needle,perplexity")
    assert plan.longest.config.model.rotary_base == 50000
    assert plan.options.tasks == ("perplexity", "needle")
    assert plan.part == "valid"


def test_other_data_has_no_parts(folder: Path) -> None:
    (folder / "other.txt").write_text("Some other text. " * 200)
    plan = planned(folder, "--data-path", str(folder / "other.txt"))
    assert (plan.part, plan.own_text) == ("all", True)


@pytest.mark.slow
def test_a_mixture_has_the_same_results_on_a_tensor_parallel_grid(folder: Path) -> None:
    argv = ["--preset", "toy-moe", "--num-layers", "1", "--hidden-size", "32"]
    argv += ["--num-experts", "4", "--moe-ffn-hidden-size", "16", "--seq-length", "64"]
    argv += ["--data-path", str(folder / "text.txt"), "--save", str(folder / "mixture")]
    argv += ["--device", "cpu", "--no-plot", "--split", "80,20", "--train-iters", "2"]
    run_ranks(train, 1, argv)
    words = ["--load", str(folder / "mixture"), "--lengths", "95", "--tasks", "perplexity"]
    words += ["--num-samples", "2", "--no-plot", "--output", str(folder / "none")]
    (alone,) = run_ranks(evaluated, 1, words)
    words += ["--tensor-parallel-size", "2"]
    assert setup_of(0, 2, words).longest.config.parallel.sequence_parallel
    assert setup_of(0, 2, [*words, "--sequence-parallel"]).longest.sequence.padding == 1
    for found in run_ranks(evaluated, 2, words):
        assert near([asdict(x) for x in found.perplexity], [asdict(x) for x in alone.perplexity])
    with pytest.raises(ConfigError, match="needs sequence parallelism beside experts"):
        setup_of(0, 2, [*words, "--no-sequence-parallel"])


CHECK = """
import sys
sys.path.insert(0, "launch")
import evaluate
code = evaluate.main(sys.argv[1:], {"RANK": "1", "WORLD_SIZE": "4"})
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


def test_a_dry_run_needs_no_torch_and_only_the_first_rank_prints(folder: Path) -> None:
    argv = ["--load", str(folder / "run"), "--dry-run", "--tensor-parallel-size", "2"]
    ended = subprocess.run(
        [sys.executable, "-c", CHECK, *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_the_program_is_thin() -> None:
    assert len(Path(SCRIPT).read_text().splitlines()) < 60


def setup_of(rank: int, world_size: int, argv: list[str]) -> EvaluationSetup:
    launch = Launch(rank=rank, world_size=world_size, local_world_size=world_size)
    arguments = parse_arguments(argv, program=EVALUATE)
    options = cast(EvaluationOptions, arguments.options)
    plan = check_evaluation(arguments.config, options, launch, given=arguments.given)
    return replace(plan, runs=tuple(run.on_device("cpu") for run in plan.runs))


def evaluated(rank: int, world_size: int, argv: list[str]) -> EvaluationResults:
    """Runs the evaluation on the pool of ranks, without printing."""
    launch = Launch(rank=rank, world_size=world_size, local_world_size=world_size)
    world = dist.group.WORLD
    assert world is not None
    return evaluate(setup_of(rank, world_size, argv), launch, world)


def test_a_hugging_face_folder_has_the_same_results(folder: Path) -> None:
    export_hf(folder / "run" / "step-2", folder / "hf")
    argv = ["--lengths", "700", "--num-samples", "2", "--buckets", "3", "--no-plot", "--output"]
    argv += [str(folder / "none"), "--data-path", str(folder / "text.txt")]
    (ours,) = run_ranks(evaluated, 1, ["--load", str(folder / "run"), *argv])
    (theirs,) = run_ranks(evaluated, 1, ["--load-hf", str(folder / "hf"), *argv])
    assert theirs.about["step"] is None
    assert near([asdict(row) for row in theirs.perplexity], [asdict(r) for r in ours.perplexity])
    assert near([asdict(row) for row in theirs.answers], [asdict(row) for row in ours.answers])
    scaled = ["--rope-type", "linear", "--rope-scaling-factor", "4"]
    (other,) = run_ranks(evaluated, 1, ["--load-hf", str(folder / "hf"), *argv, *scaled])
    assert other.perplexity[0].whole.loss != pytest.approx(ours.perplexity[0].whole.loss, rel=1e-6)
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        setup_of(0, 1, ["--load-hf", str(folder / "hf"), *argv, "--part", "valid"])


def stopped(rank: int, world_size: int, argv: list[str], to: int, row: int) -> EvaluationResults:
    """Evaluates until rank ``to`` gets a signal while row ``row`` of the run is scored."""
    request, rows = StopRequest(), iter(range(1000))
    setup = setup_of(rank, world_size, argv)

    def scored(model: nn.Module, *_: object) -> None:
        if next(rows) == row and rank == to:
            os.kill(os.getpid(), signal.SIGTERM)

    world = dist.group.WORLD
    assert world is not None
    before = signal.signal(signal.SIGTERM, request)
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: scored(module) if isinstance(module, Transformer) else None
    )
    try:
        launch = Launch(rank=rank, world_size=world_size, local_world_size=world_size)
        return evaluate(setup, launch, world, catch=lambda: nullcontext(request))
    finally:
        handle.remove()
        signal.signal(signal.SIGTERM, before)


def test_a_signal_ends_all_ranks_and_what_is_complete_is_the_result(folder: Path) -> None:
    argv = ["--load", str(folder / "run"), "--lengths", "64", "96", "--tasks", "perplexity"]
    argv += ["--num-samples", "2", "--output", str(folder / "cut"), "--no-plot"]
    argv += ["--context-parallel-size", "2"]
    whole = run_ranks(evaluated, 2, argv)[0]
    assert whole.about["stopped_by"] is None
    for row, complete in ((2, 1), (0, 0)):
        for found in run_ranks(stopped, 2, argv, row % 4 // 2, row):
            assert found.about["stopped_by"] == "SIGTERM"
            assert found.perplexity == whole.perplexity[:complete]


@pytest.mark.slow  # tests/checkpoint/test_claim_folder.py does it in one process
def test_without_output_every_evaluation_has_a_folder_of_its_own(folder: Path) -> None:
    words = [sys.executable, SCRIPT, "--load", "run", "--lengths", "64", "--tasks", "perplexity"]
    words += ["--num-samples", "1", "--no-plot"]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(words, cwd=folder, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    told = [program.communicate(timeout=60) for program in both]
    assert [(program.returncode, err) for program, (_, err) in zip(both, told)] == [(0, "")] * 2
    written = [re.findall(r"written  (\S+)", out) for out, _ in told]
    names = ["evaluation-1/results.json", "evaluation-2/results.json"]
    assert sorted(written) == [[name] for name in names]
    for out, _ in told:
        assert "scores     1 row; data and model are loaded" in out
        assert re.search(r"\n64 tokens, perplexity: 1 row in \S+ s, all done\n", out)
    assert [path.name for path in (folder / "evaluation-1").iterdir()] == ["results.json"]


def test_a_folder_that_another_evaluation_fills_is_refused_at_once(folder: Path) -> None:
    lock = FolderLock(folder / "busy", flag="--output")
    lock.acquire()
    ended = run([sys.executable, SCRIPT, "--load", "run", "--output", "busy"], folder)
    lock.release()
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert f"--output busy: process {os.getpid()} on " in line
