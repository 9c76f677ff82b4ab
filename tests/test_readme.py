"""What README says is run here, word for word."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def library_example() -> str:
    found = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found.group(1)


def run_example(rank: int, world_size: int, source: str) -> tuple[Tensor, Tensor]:
    def model_heads(tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        assert tokens.shape == (1, 1024 // world_size)
        assert positions.shape == (1024 // world_size,)
        x = torch.stack([tokens * 0.1, positions[None] * 0.01], dim=-1).double()
        return x[:, :, None], x[:, :, None], x[:, :, None]

    names = {
        "group": dist.group.WORLD,
        "tokens": torch.arange(1024)[None] % 7,
        "model_heads": model_heads,
    }
    exec(source, names)
    cp = names["cp"]
    return cp.positions, names["out"]


def test_the_library_example_runs_and_is_exact() -> None:
    ((_, whole),) = run_ranks(run_example, 1, library_example())
    for positions, out in run_ranks(run_example, 2, library_example()):
        torch.testing.assert_close(out, whole[:, positions], rtol=1e-12, atol=1e-12)


def test_the_transformers_example_is_the_one_that_is_tested() -> None:
    """README shows the calls of the module's own example, which tests/model runs."""
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    source = (ROOT / "cp_megatron/model/huggingface.py").read_text(encoding="utf-8")
    docstring = " ".join(source.partition('"""')[2].partition('"""')[0].split())
    for line in example.splitlines():
        statement = " ".join(line.partition("  #")[0].split())
        assert statement in docstring, statement


def test_the_printed_plan_is_what_the_program_prints(tmp_path: Path) -> None:
    found = re.search(r"\$ python (-m cp_megatron.plan .*)\n((?:.*\n)*?)```", README)
    assert found is not None
    command = [sys.executable, *shlex.split(found.group(1))]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = [line.rstrip() for line in found.group(2).splitlines() if line.strip()]
    printed = [line.rstrip() for line in answer.stdout.splitlines() if line.strip()]
    assert printed[: len(shown)] == shown


def test_the_refusal_is_what_the_program_says() -> None:
    found = re.search(r"\$ python (launch/pretrain.py .*)\n(pretrain.py: error: .*)\n", README)
    assert found is not None
    command = [sys.executable, *shlex.split(found.group(1))]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.strip() == found.group(2)


def test_the_paths_it_names_exist() -> None:
    for name in re.findall(r"`((?:plan|kernels|context_parallel)/[a-z_0-9]+\.py)`", README):
        assert (ROOT / "cp_megatron" / name).is_file(), name
