"""A trace of a few steps, which https://ui.perfetto.dev and chrome://tracing open.

    step            1   2   3   4   5           --profile-step-start 2 --profile-step-end 4
    profiler            w   r   r               w warms up, r records; nothing runs before or after

The parts of a step have names in it: ``traced`` in comm/trace.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from cp_megatron.comm.trace import traced
from cp_megatron.config import LogConfig


class StepProfiler:
    """Records the steps that the flags name, on the ranks that they name; else does nothing.

    Args:
        log: the flags; the steps lie inside the run.
        rank: this process.
        folder: where the trace goes.
        start_step: steps finished before.
        device: of the training.
        say: what to do with a sentence for a person; by default nothing.
    """

    def __init__(
        self,
        log: LogConfig,
        *,
        rank: int,
        folder: Path,
        start_step: int,
        device: torch.device,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.active = log.profile and rank in log.profile_ranks
        self._log, self._rank, self._folder = log, rank, folder
        self._device, self._say = device, say
        # The first profiled step of a resumed run may have none before it to warm up in.
        self._begin = max(log.profile_step_start - 1, start_step)
        self._profile: profile | None = None

    @contextmanager
    def step(self, finished: int) -> Iterator[None]:
        """Around a training step, ``finished`` steps after the run's first."""
        if not self.active:
            yield
            return
        if finished == self._begin:
            self._start()
        with traced(f"step {finished + 1}"):
            yield
        if self._profile is not None:
            self._profile.step()
            if finished + 1 == self._log.profile_step_end:
                self.close()

    def close(self) -> None:
        """Ends a profile under way; what it recorded so far is written."""
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()

    def _start(self) -> None:
        log, warms_up = self._log, self._begin < self._log.profile_step_start
        num_steps = log.profile_step_end - log.profile_step_start
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            # Without a schedule it records at once and until it is stopped.
            schedule=schedule(wait=0, warmup=1, active=num_steps, repeat=1) if warms_up else None,
            record_shapes=log.pytorch_profiler_collect_shapes,
            profile_memory=log.profile_memory,
            on_trace_ready=self._write,
        )
        self._profile.start()

    def _write(self, ready: profile) -> None:
        file = _free(self._folder, f"trace-rank{self._rank}")
        try:
            ready.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:  # a picture for people, not worth the run
            print(f"warning: {file}: the trace is not written: {error}", file=sys.stderr)
            return
        self._say(f"trace       {file}: open it in https://ui.perfetto.dev")


def _free(folder: Path, stem: str) -> Path:
    """``stem.json.gz``, or the next free name; nothing is overwritten."""
    file, number = folder / f"{stem}.json.gz", 1
    while file.exists():
        number += 1
        file = folder / f"{stem}.{number}.json.gz"
    return file
