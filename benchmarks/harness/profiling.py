"""How the time of a step divides: GEMM, attention, and everything else by the name of its op.

The figures are torch's profiler's *self* times on the CPU: the time inside an op without that of
the ops that it calls. What remains of the step's time is Python and the threads of messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_")
GEMM = ("grouped product", *(f"aten::{name}" for name in PRODUCTS))
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
OUTSIDE = "outside of ops (Python, waiting for threads)"


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Where the milliseconds of a step are.

    Attributes:
        wall: the time of the step on the clock.
        gemm: inside products of matrices.
        attention: inside the fused attention op, forward and backward.
        other: inside every other op, by its name, and outside of all ops.
    """

    wall: float
    gemm: float
    attention: float
    other: Mapping[str, float] = field(default_factory=dict)


def profiled(run: Callable[[], object], steps: int) -> StepProfile:
    """The means over ``steps`` steps, after one that is not counted."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        began = time.perf_counter()
        for _ in range(steps):
            run()
        wall = (time.perf_counter() - began) * 1e3 / steps
    ops = {row.key: row.self_cpu_time_total * 1e-3 / steps for row in recorded.key_averages()}
    ops[OUTSIDE] = wall - sum(ops.values())
    gemm = sum(ops.pop(name, 0.0) for name in GEMM)
    attention = sum(ops.pop(name) for name in [*ops] if name.startswith(ATTENTION))
    return StepProfile(wall=wall, gemm=gemm, attention=attention, other=ops)


def mean_profile(ranks: list[StepProfile]) -> StepProfile:
    """The mean over ranks."""
    names = {name for rank in ranks for name in rank.other}
    size = len(ranks)
    return StepProfile(
        wall=sum(rank.wall for rank in ranks) / size,
        gemm=sum(rank.gemm for rank in ranks) / size,
        attention=sum(rank.attention for rank in ranks) / size,
        other={name: sum(rank.other.get(name, 0.0) for rank in ranks) / size for name in names},
    )


def table(title: str, step: StepProfile, rows: int) -> str:
    """The ops outside GEMM and attention that take the most time, as text."""
    largest = sorted(step.other.items(), key=lambda item: -item[1])[:rows]
    lines = [f"{title}: {step.wall:.1f} ms a step"]
    for name, value in (("GEMM", step.gemm), ("attention", step.attention), *largest):
        lines.append(f"  {value:9.2f} ms  {value / step.wall:6.2%}  {name}")
    return "\n".join(lines)
