"""Did a change make training slower? The step time of two checkouts of this project, paired.

Each round trains the same small run once with each checkout, in a random order and in processes of
its own, by its own ``launch/pretrain.py``. A run's figure is the median time of its steps. The
result is the median of the rounds' ratios, after over before, one JSON line per case. Without
``--before`` the checkout is compared with itself, which shows the noise.

    git worktree add ../before 7a4af13
    python benchmarks/versions.py --before ../before         # half an hour on two cores
    python benchmarks/versions.py --quick                    # seconds
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from harness.teams import hardware, paired

from cp_megatron.config.words import read_options

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # steps that are not counted: buffers are allocated and schedules are planned
RUN = (
    *("--preset", "toy", "--num-layers", "4", "--hidden-size", "256"),
    *("--num-attention-heads", "8"),
    *("--num-query-groups", "2", "--dtype", "float32", "--device", "cpu"),
    *("--global-batch-size", "2", "--micro-batch-size", "1", "--eval-iters", "0"),
    *("--log-interval", "1", "--no-plot"),
)
CASES: Mapping[str, tuple[int, tuple[str, ...]]] = MappingProxyType(
    {
        "one rank": (1, ()),
        "CP 2": (2, ("--context-parallel-size", "2")),
        "CP 2, documents": (2, ("--context-parallel-size", "2", "--document-mask")),
        "TP 2": (2, ("--tensor-parallel-size", "2", "--sequence-parallel")),
        "TP 2, selective, tiles": (
            2,
            (
                *("--tensor-parallel-size", "2", "--sequence-parallel"),
                *("--recompute-granularity", "selective", "--mlp-tile-size", "256"),
            ),
        ),
    }
)
"""For each case the number of ranks and its flags. Ranks share the cores."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The step time of two checkouts, paired."""

    before: str | None = None
    """The checkout to compare with; by default this one."""
    rounds: int = 9
    """Runs of each checkout per case."""
    steps: int = 25
    """Steps of a run that are timed."""
    seq_length: int = 1024
    """Tokens per row."""
    only: str | None = None
    """The one case to measure, by its name; by default all."""
    quick: bool = False
    """Time a few short steps on one rank, which show that the script runs."""


def step_seconds(checkout: Path, num_ranks: int, words: Sequence[str]) -> float:
    """The median seconds of a step in a fresh run of ``checkout``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(num_ranks), str(checkout / "launch" / "pretrain.py")]
        command += [*RUN, *words, "--save", f"{folder}/run"]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{checkout}: {done.stderr[-2000:]}")
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(line)["step_seconds"] for line in lines[WARM_UP:])


def main() -> None:
    """Prints one line per case."""
    arguments = read_options(sys.argv[1:], Arguments, program="versions.py", description=None)
    rounds, steps, length = arguments.rounds, arguments.steps, arguments.seq_length
    names = [*CASES] if arguments.only is None else [arguments.only]
    if arguments.quick:
        rounds, steps, length, names = 2, 2, 64, ["one rank"]
    before = Path(arguments.before).resolve() if arguments.before else ROOT
    shuffle, order = random.Random(0).shuffle, [("before", before), ("after", ROOT)]
    for name in names:
        num_ranks, flags = CASES[name]
        words = [*flags, "--seq-length", str(length), "--train-iters", str(steps + WARM_UP)]
        seconds: dict[str, list[float]] = {"before": [], "after": []}
        for _ in range(rounds):
            shuffle(order)
            for which, checkout in order:
                seconds[which].append(step_seconds(checkout, num_ranks, words))
        line: dict[str, object] = {"benchmark": "versions", "case": name, "rounds": rounds}
        line |= {"step_seconds": round(statistics.median(seconds["after"]), 4)}
        line |= {"after_over_before": paired(seconds["after"], seconds["before"])}
        print(json.dumps({**line, "hardware": hardware()}), flush=True)


if __name__ == "__main__":
    main()
