"""The kernel benchmark takes the kernel whose slowest rank is the fastest, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cp_megatron.config.schema import KernelName
from cp_megatron.train import kernel_benchmark
from cp_megatron.train.kernel_benchmark import reason_of, with_fastest_kernel
from cp_megatron.train.optimizer import local_values
from cp_megatron.train.step import TrainStep
from tests.ranks import run_ranks
from tests.train.test_loop import BASE, assembled, finish

Found = tuple[str, str, bool, int]
KERNELS: list[KernelName] = ["cpu", "reference"]


def benchmarked(rank: int, world_size: int, argv: list[str], slow: dict[str, int]) -> Found:
    """The kernel, the reason, whether nothing was changed, and the last step of the run.

    Args:
        slow: the rank on which each kernel pretends to take an hour longer.
    """
    before = kernel_benchmark._seconds

    def seconds(step: TrainStep, batch: object) -> float:
        name = step.cp.kernels._name
        return before(step, batch) + 3600 * (slow.get(name) == rank)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        # The package of one candidate is not there, as an installed one may fail to load.
        names = ["flash_attn_3", *KERNELS]
        patch.setattr(kernel_benchmark, "candidates", lambda **_: names)
        patch.setattr(kernel_benchmark, "_seconds", seconds)
        run = assembled(rank, world_size, argv)
        parameters = list(run.train_step.model.parameters())
        held = [local_values(x).clone() for x in parameters]
        chosen = with_fastest_kernel(run)
    same = all(map(torch.equal, map(local_values, parameters), held))
    same &= all(x.grad is None for x in parameters)
    kernel = chosen.plan.kernel
    assert kernel is not None
    assert chosen.train_step.cp.kernels._name == kernel.name
    return kernel.name, kernel.reason, same, finish(chosen)


@pytest.mark.parametrize("slow", ["cpu", "reference"])
def test_the_kernel_with_the_fastest_slowest_rank_is_taken(slow: str, tmp_path: Path) -> None:
    argv = [*BASE, "--save", str(tmp_path / "run"), "--context-parallel-size", "2"]
    results = run_ranks(benchmarked, 2, [*argv, "--document-mask"], {slow: 1})
    assert len(set(results)) == 1
    name, reason, same, last = results[0]
    assert {name, slow} == {*KERNELS}
    assert reason.startswith(f"the fastest in forward and backward of a micro batch: {name} ")
    assert same
    assert last == 4


def test_the_reason_names_every_kernel_with_its_time() -> None:
    assert reason_of({"cpu": 0.1}) == "the only kernel that fits"
    reason = reason_of({"cuda": 1.25, "cudnn": 0.0125})
    assert reason.endswith("micro batch: cudnn 12.5 ms, cuda 1,250 ms")
