"""The training loop: steps and, around them, validation, metrics, checkpoints and early stops."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch.distributed as dist
from safetensors import SafetensorError

from cp_megatron.checkpoint.object_collectives import all_gather_objects
from cp_megatron.comm.host_numbers import largest
from cp_megatron.comm.signals import StopRequest
from cp_megatron.comm.stopping import Stopping
from cp_megatron.comm.trace import traced
from cp_megatron.data.batch.ahead import Ahead
from cp_megatron.data.batch.batch import Batch, microbatches
from cp_megatron.data.rows.sampler import RowSource, RowSplits
from cp_megatron.faults.checks import Checks
from cp_megatron.faults.device_guard import DeviceGuard
from cp_megatron.faults.guard import SPAN, Guard, Verdict
from cp_megatron.faults.inject import Faults
from cp_megatron.faults.stragglers import Stragglers
from cp_megatron.memory.measure import MemoryMeter
from cp_megatron.memory.memory_report import MemoryReport
from cp_megatron.memory.predict import predict
from cp_megatron.metrics.writer import Metrics, MetricsWriter, peak_flops, peak_memory
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.train.bad_batch import save_batch
from cp_megatron.train.late_results import Judged, Results
from cp_megatron.train.profiler import StepProfiler
from cp_megatron.train.progress import ProgressView
from cp_megatron.train.saving import Saver
from cp_megatron.train.shard import Shard
from cp_megatron.train.step import Accept, LaunchedStep, StepResult, TrainStep


class DivergedError(RuntimeError):
    """Training cannot continue: too many skipped steps, a non-finite value, or corrupted data. All
    ranks raise it together."""


@dataclass(kw_only=True)
class _Loop:
    """What changes from step to step."""

    stopping: Stopping
    results: Results
    latest: Judged | None = None  # the newest result that was read
    times: list[tuple[float, float]] = field(default_factory=list)
    """Seconds and attended pairs of the steps since the last logged one."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A run that is ready to train."""

    plan: RunPlan
    train_step: TrainStep
    rows: RowSplits
    folder: Path  # the run's folder
    control: dist.ProcessGroup  # a group of all ranks for CPU tensors
    saver: Saver
    writer: MetricsWriter | None  # writes the metrics; on rank 0 only
    view: ProgressView
    profiler: StepProfiler
    guard: Guard = field(default_factory=Guard)
    faults: Faults = field(default_factory=Faults)  # the faults injected on this rank
    checks: Checks | None = None  # detect silent data corruption; None disables them
    stragglers: Stragglers | None = None  # finds ranks that the others wait for; None disables it
    began: float = field(default_factory=time.monotonic)  # when the program was started

    def train(self, stop: StopRequest) -> int:
        """Trains to the end, or until a rank is asked to stop or its time is over, and saves.

        Returns:
            The last finished step.

        Raises:
            DivergedError: too many steps were skipped, the validation loss or a parameter is not
                finite, or data was corrupted.
            ConfigError: the checkpoint cannot be written.
        """
        step = self.plan.load_step
        first, num_steps = step + 1, self.plan.last_step
        lag = Results.lag_on(self.train_step.device)
        now = _Loop(stopping=self._stopping(stop), results=Results(self.guard, lag=lag))
        accept = DeviceGuard(self.guard, self.train_step.device).accept
        with closing(self.profiler), Ahead(self._shards(first, num_steps)) as ahead:
            for step in range(first, num_steps + 1):
                if not self._advance(step, ahead, now, accept):
                    self._end_after(step - 1, now)
                    return step - 1
                if self._finish(step, now):
                    break
        return step

    def _advance(
        self, step: int, shards: Iterator[list[Shard]], now: _Loop, accept: Accept
    ) -> bool:
        """Launches a step and reads what must be read now; False if the ranks stop before it."""
        lr, is_first = self.plan.learning_rate_at(step), step == self.plan.load_step + 1
        meter = None
        if self.plan.config.memory.memory_report and is_first:
            meter = self.train_step.memory_meter(self.plan.num_microbatches)
        with self.profiler.step(step):
            begin = time.perf_counter()
            with meter or nullcontext():
                launched = self._step(step, shards, lr, now.stopping, accept)
            if launched is None:
                return False
            now.results.add(step, launched)
            self._read(now, everything=self._needs_results(step))
            told = launched.announcement
            now.times.append((time.perf_counter() - begin, told.num_pairs))
        if self.stragglers is not None and not is_first:  # the first step warms up
            self.stragglers.waited(told.waited)
        if meter is not None:
            self._report_memory(step, meter)
        return True

    def _finish(self, step: int, now: _Loop) -> bool:
        """Does what is due after a step; returns whether the run ends with it."""
        config, stopping = self.plan.config, now.stopping
        # The next step's message tells the others, unless the answer is needed now.
        stopping.note()
        exits, validates = self._exits(step), self._validates(step)
        ends = ((exits or validates) and stopping.agreed()) or exits
        saves = ends or self._is_due(step, config.checkpoint.save_interval)
        self._check(step, saves=saves)
        validates = validates and not stopping.reason
        metrics = None
        if ends or validates or self._logs(step):
            metrics = self._measure(step, now)
        self._write_and_save(step, metrics, saves=saves, last=ends or step == self.plan.last_step)
        valid_loss = self._validate(step, stopping) if validates else None
        self._log(metrics, valid_loss)
        self.view.step_done(step)
        return self._leaves(step, stopping, interrupted=validates and bool(stopping.reason))

    def _end_after(self, step: int, now: _Loop) -> None:
        """Ends the run with a step that is finished, as the ranks agreed before the next one."""
        begin = time.perf_counter()
        self._read(now, everything=True)
        seconds, num_pairs = now.times.pop() if now.times else (0.0, 0.0)
        now.times.append((seconds + time.perf_counter() - begin, num_pairs))
        self.saver.settle()
        saves = self.saver.saved != step
        self._check(step, saves=saves)
        metrics = None if self._logs(step) else self._measure(step, now)
        self._write_and_save(step, metrics, saves=saves, last=True)
        self._log(metrics, None)
        self._leaves(step, now.stopping, interrupted=False)

    def _read(self, now: _Loop, *, everything: bool) -> None:
        """Reads the results that are due; reports the steps that were skipped."""
        for judged in now.results.read(everything=everything):
            now.latest = judged
            if not judged.verdict.accepted:
                self._skip(judged.step, judged.result, judged.verdict)

    def _needs_results(self, step: int) -> bool:
        """Whether something is due after a step that needs its result and all before it."""
        is_checked = self.checks is not None and self.checks.due(step)
        saves = self._is_due(step, self.plan.config.checkpoint.save_interval)
        return saves or is_checked or self._logs(step) or self._validates(step) or self._exits(step)

    def _write_and_save(
        self, step: int, metrics: Metrics | None, *, saves: bool, last: bool
    ) -> None:
        """Writes what is due after a step, so that a kill during its validation loses nothing."""
        self._write(metrics)
        self.saver.poll()
        if saves:
            self._save(step, last=last)

    def _leaves(self, step: int, stopping: Stopping, *, interrupted: bool) -> bool:
        """Whether the run ends before its last step; then ``step`` is saved."""
        if interrupted:
            self.view.say(f"step {step}: its validation was interrupted and has no result")
            self.saver.settle()
            if self.saver.saved != step:
                self._save(step, last=True)
        if step == self.plan.last_step or not (stopping.reason or self._exits(step)):
            return False
        why = stopping.reason or f"--exit-interval {self.plan.config.train.exit_interval}"
        self.view.say(f"step {step}: {why} ends the run")
        return True

    def _stopping(self, stop: StopRequest) -> Stopping:
        minutes = self.plan.config.train.exit_duration_in_mins
        if minutes is None:
            return Stopping(stop, self.control)
        flag = f"--exit-duration-in-mins {minutes:g}"
        return Stopping(stop, self.control, end=self.began + 60 * minutes, limit=flag)

    def _exits(self, step: int) -> bool:
        """Whether the run ends here as the user planned; the same command continues it."""
        interval = self.plan.config.train.exit_interval
        return bool(interval and step % interval == 0)

    def _is_due(self, step: int, interval: int | None) -> bool:
        """Whether ``step`` is the last of the run or of an interval."""
        return step == self.plan.last_step or bool(interval and step % interval == 0)

    def _logs(self, step: int) -> bool:
        """Whether a step is logged; step 1 is, because it shows where the loss started."""
        return step == 1 or self._is_due(step, self.plan.config.train.log_interval)

    def _step(
        self,
        step: int,
        shards: Iterator[list[Shard]],
        lr: float,
        stopping: Stopping,
        accept: Accept,
    ) -> LaunchedStep | None:
        """Trains on the next batch; None if the ranks stop before it."""
        trained, faults = self.train_step, self.faults
        with traced("wait for rows"):
            batch = next(shards)
        try:
            told = trained.announce(batch, step=step, wish=stopping.wish, faults=faults)
            if stopping.heard(told.wish):
                return None
            if self.checks is not None:
                self.checks.begin(step)
            return trained.launch(batch, told, step=step, lr=lr, accept=accept, faults=faults)
        except Exception as error:
            error.add_note(f"step {step}")
            raise

    def _check(self, step: int, *, saves: bool) -> None:
        """Ends the run if data was corrupted; always checks before a save."""
        if self.checks is None or not (saves or self.checks.due(step)):
            return
        if finding := self.checks.find(step):
            works = "resume from it; if it recurs, use other hardware"
            raise self._diverged(step, finding, works)

    def _skip(self, step: int, result: StepResult, verdict: Verdict) -> None:
        """Reports that a step was not applied, or ends the run; the same on every rank."""
        # If the model itself is broken, all following steps are bad too.
        broken = not verdict.finite and self._is_broken()
        if not verdict.over and not broken:
            allowed = f"{verdict.num_skipped} of at most {self.guard.budget} in {SPAN:,} steps"
            self.view.say(f"step {step}: {verdict.numbers}: skipped ({allowed})")
            return
        reason = f"{verdict.numbers} and a parameter is not finite" if broken else verdict.numbers
        if self.guard.budget and not broken:
            reason += f", {verdict.num_skipped} steps of {SPAN:,} skipped"
        raise self._diverged(step, f"{reason}; {self._keep_batch(step, result)}")

    def _keep_batch(self, step: int, result: StepResult) -> str:
        """Writes the batch of a step, on rank 0, so that it can be examined; says where it is."""
        self.saver.settle()
        data, file = self.plan.config.data, self.folder / f"bad-step-{step}.safetensors"
        numbers = self.plan.rows_of(step)
        about: dict[str, object] = {"step": step, "loss": result.loss}
        about |= {"grad_norm": result.grad_norm, "checkpoint": self.saver.saved or "none"}
        try:
            if self.control.rank() == 0:
                mask = data.document_mask
                save_batch(file, self.rows.train, numbers, document_mask=mask, about=about)
        except (OSError, SafetensorError) as error:
            return f"its batch could not be written: {error}"
        return f"its batch is in {file}"

    def _shards(self, first: int, last: int) -> Iterator[list[Shard]]:
        """This rank's shards of the global batches of steps ``first`` to ``last``."""
        for step in range(first, last + 1):
            batches = self.batches(self.rows.train, self.plan.rows_of(step).start)
            yield [*map(self.train_step.prepare, batches)]

    def batches(self, rows: RowSource, consumed: int) -> Iterator[Batch]:
        """This rank's micro batches of the global batch that begins at row ``consumed``."""
        data, groups = self.plan.config.data, self.train_step.groups
        return microbatches(
            rows,
            consumed=consumed,
            global_batch_size=self.plan.rows_per_step,
            micro_batch_size=self.plan.micro_batch_size,
            dp_rank=groups.coordinates.dp,
            dp_size=groups.grid.dp,
            document_mask=data.document_mask,
            window=self.plan.config.model.row_window,
            padding=self.plan.sequence.padding,
        )

    def _validates(self, step: int) -> bool:
        """Whether a validation is due: every ``eval_interval`` steps and at the end."""
        train = self.plan.config.train
        has_rows = bool(train.eval_iters) and self.rows.valid is not None
        return has_rows and self._is_due(step, train.eval_interval)

    def _validate(self, step: int, stopping: Stopping) -> float | None:
        """The validation loss; None if the ranks stop before it is complete."""
        rows = self.rows.valid
        assert rows is not None
        shards = (
            self.train_step.prepare(batch, announced=False)
            for number in range(self.plan.config.train.eval_iters)
            for batch in self.batches(rows, number * self.plan.rows_per_step)
        )
        with Ahead(shards) as ahead:
            loss = self.train_step.evaluate(stopping.limit(ahead))
        if stopping.reason:
            return None
        if not math.isfinite(loss):
            raise self._diverged(step, f"validation loss {loss}")
        return loss

    def _measure(self, step: int, now: _Loop) -> Metrics | None:
        """The metrics of a step but for its validation, and of the times since the last ones.

        None if they are not finite.
        """
        assert now.latest is not None
        assert now.latest.step == step, "all results are read"
        if not now.latest.verdict.finite:
            return None
        result = now.latest.result
        config = self.plan.config
        seconds, num_pairs = map(fmean, zip(*now.times))
        now.times.clear()
        num_tokens = self.plan.rows_per_step * config.data.seq_length
        return Metrics(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=self.plan.learning_rate_at(step),
            tokens=self.plan.tokens_after(step),
            tokens_per_second=num_tokens / seconds,
            step_seconds=seconds,
            mfu=self._utilisation(num_tokens, num_pairs, seconds),
            memory_bytes=largest(peak_memory(self.train_step.device), self.control),
            params_norm=self.train_step.params_norm() if config.log.log_params_norm else None,
            num_zeros_in_grad=result.num_zeros,
            **({} if result.experts is None else result.experts.metrics()),
        )

    def _write(self, metrics: Metrics | None) -> None:
        """Writes the metrics of a step, or replaces those that were written before."""
        if self.writer is not None and metrics is not None:
            self.writer.write(metrics)

    def _log(self, metrics: Metrics | None, valid_loss: float | None) -> None:
        """Prints the metrics of a step, and adds the loss of its validation if there was one."""
        if metrics is None:
            return
        if valid_loss is not None:
            metrics = replace(metrics, valid_loss=valid_loss)
            self._write(metrics)
        self.view.log(metrics)
        seconds = metrics.step_seconds
        for finding in self.stragglers.find(seconds) if self.stragglers is not None else ():
            self.view.say(f"step {metrics.step}: {finding}")

    def _report_memory(self, step: int, meter: MemoryMeter) -> None:
        """Prints what each rank holds in memory, and writes it into the run's folder; on rank 0."""
        mine = predict(self.plan, self.control.rank()), meter.held()
        predicted, measured = zip(*all_gather_objects(mine, self.control))
        if self.control.rank() == 0:
            report = MemoryReport(plan=self.plan, predicted=predicted, measured=measured)
            report.write(self.folder, step=step)
            report.print(self.view.console)

    def _utilisation(self, num_tokens: int, num_pairs: float, seconds: float) -> float | None:
        """Model FLOP/s over the peak of all devices; attention counts only attended pairs."""
        peak = peak_flops(self.train_step.device)
        if peak is None:
            return None
        spec = self.train_step.model.spec
        flops = spec.training_flops(num_tokens=num_tokens, num_pairs=num_pairs)
        return flops / seconds / (peak * self.train_step.groups.grid.world_size)

    def _is_broken(self) -> bool:
        """Whether a parameter value of any rank is not finite."""
        return bool(largest(int(not self.train_step.is_finite()), self.control))

    def _save(self, step: int, *, last: bool) -> None:
        """Saves, unless the last update made a parameter infinite, which its loss cannot show."""
        if self._is_broken():
            raise self._diverged(step, "a parameter is not finite")
        self.saver.save(step, self.train_step, last=last, extra={"guard": self.guard.state()})

    def _diverged(self, step: int, reason: str, works: str = "often a lower --lr") -> DivergedError:
        """The error that every rank raises, after the save in progress has ended."""
        self.saver.settle()
        saved = self.saver.saved
        last = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint"
        return DivergedError(f"step {step}: {reason}; {last} (works: {works})")
