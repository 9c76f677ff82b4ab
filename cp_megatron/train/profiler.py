"""A trace of a few steps, which https://ui.perfetto.dev and chrome://tracing can open.

    step            1   2   3   4   5           --profile-step-start 2 --profile-step-end 4
    profiler            w   r   r               w warms up, r records; it is off in other steps

The trace shows the parts of a step by the names that ``traced`` (comm/trace.py) gives them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from cp_megatron.comm.trace import traced
from cp_megatron.config import LogConfig


class StepProfiler:
    """Records the steps that the flags name, on the ranks that they name.

    Args:
        log: the flags; the steps lie inside the run.
        folder: the folder to write the trace into.
        start_step: steps finished before the run started.
        say: called with a line for the user when the trace is written.
    """

    def __init__(
        self,
        log: LogConfig,
        *,
        rank: int,
        folder: Path,
        start_step: int,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.active = log.profile and rank in log.profile_ranks
        self._log, self._rank, self._folder = log, rank, folder
        self._device, self._say = device, say
        # The profiler warms up in the step before the first one that it records. A resumed run may
        # have no such step.
        self._begin = max(log.profile_step_start, start_step + 1)
        self._profile: profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Wraps step number ``step``, from 1."""
        if not self.active:
            yield
            return
        if step == self._begin:
            self._start()
        with traced(f"step {step}"):
            yield
        if self._profile is not None:
            self._profile.step()
            if step == self._log.profile_step_end:
                self.close()

    def close(self) -> None:
        """Ends the profile in progress, if any, and writes what it has recorded."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()

    def _start(self) -> None:
        log, warms_up = self._log, self._begin <= self._log.profile_step_start
        num_steps = log.profile_step_end - log.profile_step_start
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            # Without a schedule, the profiler records from now on until it is stopped.
            schedule=schedule(wait=0, warmup=1, active=num_steps, repeat=1) if warms_up else None,
            record_shapes=log.pytorch_profiler_collect_shapes,
            profile_memory=log.profile_memory,
            on_trace_ready=self._write,
        )
        self._profile.start()

    def _write(self, finished: profile) -> None:
        suffixes = ("" if number == 1 else f".{number}" for number in count(1))
        files = (self._folder / f"trace-rank{self._rank}{x}.json.gz" for x in suffixes)
        file = next(file for file in files if not file.exists())
        try:
            finished.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:  # a missing trace is no reason to end the run
            print(f"warning: {file}: the trace is not written: {error}", file=sys.stderr)
            return
        self._say(f"trace       {file}: open it in https://ui.perfetto.dev")
