"""On a GPU, no step waits for it between two log lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.preflight.check import check
from cp_megatron.train.run import assemble
from tests.ranks import run_ranks
from tests.train.test_loop import Place, StoppingView, changed, finish
from tests.train.test_loop import place as place  # the fixture

pytestmark = pytest.mark.gpu

LONG = "--device", "cuda", "--train-iters", "7", "--log-interval", "7", "--eval-iters", "0"
FIRST, LAST = 3, 5
"""The steps that must not wait; the ones before choose kernels and allocate."""


class StrictView(StoppingView):
    """A view that makes waiting an error in some steps."""

    def step_done(self, step: int) -> None:
        strict = FIRST - 1 <= step < LAST
        torch.cuda.set_sync_debug_mode("error" if strict else "default")


def strict_run(rank: int, world_size: int, argv: list[str], store: str) -> int:
    """The last step of a run with NCCL, which one rank can use."""
    if dist.is_initialized():
        dist.destroy_process_group()
    device = torch.device("cuda", 0)
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": world_size}
    dist.init_process_group("nccl", device_id=device, **options)
    launch, found = Launch(under_torchrun=True), parse_arguments(argv)
    try:
        plan = check(found.config, launch, given=found.given, auto=found.auto)
        plan = plan.on_device("cuda", capability=torch.cuda.get_device_capability())
        control = dist.new_group(backend="gloo")
        assert control is not None
        return finish(assemble(plan, launch, control), StrictView())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--document-mask"],
        ["--spike-threshold", "6", "--log-num-zeros-in-grad", "--hidden-dropout", "0.1"],
        ["--recompute-granularity", "selective"],
    ],
    ids=" ".join,
)
def test_steps_do_not_wait(place: Place, flags: list[str], tmp_path: Path) -> None:
    argv = changed(place.argv("run", *flags), *LONG)
    assert run_ranks(strict_run, 1, argv, str(tmp_path / "store"), timeout=200) == [7]
