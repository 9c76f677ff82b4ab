"""Times the attention kernels on the run's own rows, and takes the fastest.

A table in ``kernels/select.py`` gives the order that ``auto`` tries. Which kernel is fastest also
depends on the GPU, on the versions of packages, and on the lengths of documents; forward and
backward of the model on the first micro batch show it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from cp_megatron.comm.host_numbers import gather_numbers
from cp_megatron.data.batch.batch import Batch
from cp_megatron.errors import ConfigError
from cp_megatron.faults.inject import Faults
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.kernels.select import KernelChoice, candidates
from cp_megatron.preflight.run_plan import RunPlan, kernel_needs
from cp_megatron.preflight.start import make_context
from cp_megatron.train.announcement import Announcement
from cp_megatron.train.loop import Trainer
from cp_megatron.train.step import TrainStep

PASSES = 3
"""Passes per kernel; the fastest counts. The first one builds and loads what the kernel needs."""


def with_fastest_kernel(trainer: Trainer) -> Trainer:
    """The trainer with the kernel whose slowest rank is the fastest, and the reason in its plan.

    Every rank calls it. It changes neither parameters nor gradients.

    Raises:
        ConfigError: no kernel fits.
    """
    plan, device = trainer.plan, trainer.plan.device
    assert device is not None, "known since the process group is"
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    names = candidates(**kernel_needs(plan.config, device, capability))
    softcap = plan.config.model.attn_logit_softcapping
    loaded = gather_numbers([_loads(name, softcap) for name in names], trainer.control)
    able = [name for name, all_load in zip(names, map(all, zip(*loaded))) if all_load]
    names = able or names[:1]  # whose error is then shown
    batch = next(trainer.batches(trainer.rows.train, plan.rows_of(plan.load_step + 1).start))
    steps = {name: _with_kernel(trainer, name, reason="timed") for name in names}
    own = [_seconds(step, batch) if len(names) > 1 else 0.0 for _, step in steps.values()]
    seconds = dict(zip(names, map(max, zip(*gather_numbers(own, trainer.control)))))
    best = min(names, key=lambda name: seconds[name])
    new_plan, train_step = _with_kernel(trainer, best, reason=reason_of(seconds))
    return replace(trainer, plan=new_plan, train_step=train_step)


def _loads(name: str, softcap: float | None) -> bool:
    """Whether the kernel's package can be used; only its module was looked for so far."""
    try:
        load_kernel(name, softcap=softcap)
    except (ImportError, ConfigError):
        return False
    return True


def reason_of(seconds: Mapping[str, float]) -> str:
    """What was found, the fastest first, in milliseconds of a forward and backward pass."""
    if len(seconds) == 1:
        return "the only kernel that fits"
    found = sorted(seconds.items(), key=lambda item: item[1])
    times = ", ".join(f"{name} {1e3 * spent:,.4g} ms" for name, spent in found)
    return f"the fastest in forward and backward of a micro batch: {times}"


def _with_kernel(trainer: Trainer, name: str, *, reason: str) -> tuple[RunPlan, TrainStep]:
    plan, step = trainer.plan, trainer.train_step
    assert plan.device is not None
    choice = KernelChoice(name=name, reason=reason)
    plan = replace(plan, kernels={plan.device: choice})
    cp = make_context(plan, step.groups)
    # The checks of messages read the sums of the context that they were given.
    cp.buffers, cp.link_sums = step.cp.buffers, step.cp.link_sums
    return plan, replace(step, cp=cp)


def _seconds(step: TrainStep, batch: Batch) -> float:
    """The best time of forward and backward of a micro batch; its gradients are dropped."""
    shard = step.prepare(batch, announced=False)
    step.model.train()
    announcement = Announcement(num_tokens=1, num_counted=1, num_pairs=0.0, wish=0, waited=0.0)
    found = []
    for _ in range(PASSES):
        _wait(step.device)
        begin = time.perf_counter()
        step.passes.train([shard], announcement, 0, Faults())
        _wait(step.device)
        found.append(time.perf_counter() - begin)
        step.optimizer.zero_grad()
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
