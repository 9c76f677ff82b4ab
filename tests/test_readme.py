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
