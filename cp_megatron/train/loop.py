"""The loop: steps, and around them validation, metrics, checkpoints and the wish to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from cp_megatron.comm.trace import traced
from cp_megatron.data.batch.ahead import Ahead
from cp_megatron.data.batch.batch import Batch, microbatches
from cp_megatron.data.rows.sampler import RowSource, RowSplits
from cp_megatron.faults.checks import Checks
from cp_megatron.faults.guard import SPAN, Guard, Verdict
from cp_megatron.faults.inject import Faults
from cp_megatron.faults.stragglers import Stragglers
from cp_megatron.memory.measure import MemoryMeter
from cp_megatron.memory.memory_report import MemoryReport
from cp_megatron.memory.predict import predict
from cp_megatron.metrics.writer import (
    Metrics,
    MetricsWriter,
    peak_flops,
    peak_memory,
)
from cp_megatron.preflight.check import RunPlan
from cp_megatron.train.optimizer import learning_rate
from cp_megatron.train.profiler import StepProfiler
from cp_megatron.train.progress import ProgressView
from cp_megatron.train.replay import batch_file, save_batch
from cp_megatron.train.saving import Saver
from cp_megatron.train.signals import StopRequest
from cp_megatron.train.step import Shard, StepResult, TrainStep


class DivergedError(RuntimeError):
    """The training's numbers went bad; every rank raises it at the same step, on one line."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """All that a run consists of.

    Attributes:
        plan: what was decided before torch was loaded.
        train_step: the model and what moves it.
        rows: the data.
        data_fingerprint: of the corpus.
        folder: where the run is kept.
        control: a group of all ranks for CPU tensors.
        saver: writes the checkpoints.
        writer: the metrics, on rank 0 only.
        view: what a person sees.
        profiler: writes a trace of some steps where asked to.
        guard: says which steps are skipped.
        faults: what this rank does wrong on purpose.
        checks: find numbers that change by themselves; None does not look.
        stragglers: find ranks that the others wait for; None does not look.
    """

    plan: RunPlan
    train_step: TrainStep
    rows: RowSplits
    data_fingerprint: str
    folder: Path
    control: dist.ProcessGroup
    saver: Saver
    writer: MetricsWriter | None
    view: ProgressView
    profiler: StepProfiler
    guard: Guard = field(default_factory=Guard)
    faults: Faults = field(default_factory=Faults)
    checks: Checks | None = None
    stragglers: Stragglers | None = None

    def train(self, start_step: int, stop: StopRequest) -> int:
        """Trains from ``start_step`` to the end or until asked to stop; saves; the last step.

        Raises:
            DivergedError: too many steps were skipped, the validation loss or a parameter is not
                finite, or a number changed by itself.
            ConfigError: the checkpoint can not be written.
        """
        with (
            closing(self.profiler),
            Ahead(self._shards(self.rows.train, start_step)) as shards,
        ):
            return self._train(shards, start_step, stop)

    def _train(self, shards: Iterator[list[Shard]], start_step: int, stop: StopRequest) -> int:
        """``train`` on this rank's shards of each step to come."""
        train = self.plan.config.train
        interval = self.plan.config.checkpoint.save_interval
        clock = _Clock()
        step = start_step
        while step < train.train_iters:
            rate = learning_rate(step, self.plan.config.optimizer, train.train_iters)
            if self.checks is not None:
                self.checks.begin(step + 1)
            measures = self.plan.config.memory.memory_report and step == start_step
            meter = MemoryMeter(self.train_step) if measures else None
            with self.profiler.step(step), clock, meter or nullcontext():
                with traced("wait for rows"):
                    found = next(shards)
                with noted(f"step {step + 1}"):
                    verdict, result = self._step(found, step, rate)
                clock.num_pairs += result.num_pairs
            if self.stragglers is not None and step > start_step:  # the first warms up
                self.stragglers.waited(result.waited)
            step += 1
            if not verdict.accepted:
                self._skip(step, result, verdict)
            stopping = any_rank_stops(stop, self.control)
            last = stopping or step == train.train_iters
            saves = last or bool(interval and step % interval == 0)
            self._check(step, saves=saves)
            if meter is not None:
                self._report_memory(step, meter)
            valid_loss = None if stopping else self._validate(step)
            # The first step too: it shows where the loss came from.
            due = last or step == 1 or step % train.log_interval == 0 or valid_loss is not None
            if due and verdict.finite:
                self._log(step, result, rate, clock, valid_loss)
            self.view.step_done(step)
            self.saver.poll()
            if saves:
                self._save(step, last=last)
            if stopping:
                break
        return step

    def _step(self, shards: list[Shard], step: int, rate: float) -> tuple[Verdict, StepResult]:
        """Trains on a batch, unless its numbers went bad."""
        verdicts: list[Verdict] = []

        def accept(loss: float, grad_norm: float) -> bool:
            verdicts.append(self.guard.judge(step + 1, loss, grad_norm))
            return verdicts[0].accepted

        result = self.train_step.run(shards, step=step, lr=rate, accept=accept, faults=self.faults)
        return verdicts[0], result

    def _check(self, step: int, *, saves: bool) -> None:
        """Ends the run where a number changed by itself; what is saved was looked at before."""
        if self.checks is None or not (saves or self.checks.due(step)):
            return
        found = self.checks.find(step)
        if found is not None:
            raise self._diverged(
                step, found, "to go on from it; on other hardware if that happens again"
            )

    def _skip(self, step: int, result: StepResult, verdict: Verdict) -> None:
        """Says that a step changed nothing, or ends the run, on every rank alike."""
        # Where the model itself is broken every step to come is bad too.
        broken = not verdict.finite and self._is_broken()
        if not verdict.over and not broken:
            allowed = f"{verdict.num_skipped} of at most {self.guard.budget} in {SPAN:,} steps"
            self.view.say(f"step {step}: {verdict.found}: skipped ({allowed})")
            return
        found = f"{verdict.found} and a parameter is not finite" if broken else verdict.found
        if self.guard.budget and not broken:
            found += f", {verdict.num_skipped} steps of {SPAN:,} skipped"
        raise self._diverged(step, f"{found}; {self._keep_batch(step, result)}")

    def _keep_batch(self, step: int, result: StepResult) -> str:
        """Writes the batch of a step for whoever looks into it, on rank 0; says where it is."""
        self.saver.settle()
        data, file = self.plan.config.data, batch_file(self.folder, step)
        size = data.global_batch_size or 0
        about: dict[str, object] = {"step": step, "loss": result.loss}
        about |= {"grad_norm": result.grad_norm, "checkpoint": self.saver.saved or "none"}
        try:
            if self.control.rank() == 0:
                save_batch(
                    file,
                    self.rows.train,
                    first=(step - 1) * size,
                    size=size,
                    document_mask=data.document_mask,
                    about=about,
                )
        except (OSError, SafetensorError) as error:
            return f"its batch could not be written: {error}"
        return f"its batch is in {file}"

    def _shards(self, rows: RowSource, first: int) -> Iterator[list[Shard]]:
        """This rank's shards of the training's global batches from number ``first`` on."""
        for number in range(first, self.plan.config.train.train_iters):
            yield [self.train_step.prepare(batch) for batch in self._batches(rows, number)]

    def _batches(self, rows: RowSource, number: int) -> Iterator[Batch]:
        """This rank's micro batches of global batch ``number``."""
        data, groups = self.plan.config.data, self.train_step.groups
        size = data.global_batch_size
        assert size is not None, "preflight fills it in"
        return microbatches(
            rows,
            consumed=number * size,
            global_batch_size=size,
            micro_batch_size=self.plan.micro_batch_size,
            dp_rank=groups.coordinates.dp,
            dp_size=groups.grid.dp,
            document_mask=data.document_mask,
            window=self.plan.config.model.row_window,
            padding=self.plan.sequence.padding,
        )

    def _validate(self, step: int) -> float | None:
        """The validation loss where one is due: every ``eval_interval`` steps and at the end."""
        train = self.plan.config.train
        due = step == train.train_iters or (train.eval_interval and step % train.eval_interval == 0)
        if not due or not train.eval_iters or self.rows.valid is None:
            return None
        rows = self.rows.valid
        shards = (
            self.train_step.prepare(batch)
            for number in range(train.eval_iters)
            for batch in self._batches(rows, number)
        )
        with Ahead(shards) as ahead:
            loss = self.train_step.evaluate(ahead)
        if not math.isfinite(loss):
            raise self._diverged(step, f"validation loss {loss}")
        return loss

    def _log(
        self, step: int, result: StepResult, rate: float, clock: _Clock, valid_loss: float | None
    ) -> None:
        data = self.plan.config.data
        seconds, num_pairs = clock.means()
        batch_tokens = (data.global_batch_size or 0) * data.seq_length
        memory = torch.tensor(peak_memory(self.train_step.device), dtype=torch.int64)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX, group=self.control)
        metrics = Metrics(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=rate,
            tokens=step * batch_tokens,
            tokens_per_second=batch_tokens / seconds,
            step_seconds=seconds,
            mfu=self._utilisation(batch_tokens, num_pairs, seconds),
            memory_bytes=int(memory.item()),
            valid_loss=valid_loss,
        )
        if self.writer is not None:
            self.writer.write(metrics)
        self.view.log(metrics)
        for found in self.stragglers.find(seconds) if self.stragglers is not None else ():
            self.view.say(f"step {step}: {found}")

    def _report_memory(self, step: int, meter: MemoryMeter) -> None:
        """Tells what each rank holds, on rank 0, and writes it into the run's folder."""
        mine = predict(self.plan, self.control.rank()), meter.held()
        ranks: list[Any] = [None] * self.control.size()
        dist.all_gather_object(ranks, mine, group=self.control)
        if self.control.rank() == 0:
            predicted, measured = zip(*ranks)
            report = MemoryReport(plan=self.plan, predicted=predicted, measured=measured)
            report.write(self.folder, step=step)
            report.print(self.view.console)

    def _utilisation(self, num_tokens: int, num_pairs: float, seconds: float) -> float | None:
        """Model FLOP/s over all devices' peak; of attention only what the masks allow counts."""
        peak = peak_flops(self.train_step.device)
        if peak is None:
            return None
        flops = self.train_step.model.spec.training_flops(
            num_tokens=num_tokens, num_pairs=num_pairs
        )
        return flops / seconds / (peak * self.train_step.groups.grid.world_size)

    def _is_broken(self) -> bool:
        """Whether any parameter value of any rank is not finite."""
        broken = torch.tensor(int(not self.train_step.is_finite()))
        dist.all_reduce(broken, op=dist.ReduceOp.MAX, group=self.control)
        return bool(broken.item())

    def _save(self, step: int, *, last: bool) -> None:
        """Saves, unless the last update left the finite numbers, which its loss can not show."""
        if self._is_broken():
            raise self._diverged(step, "a parameter is not finite")
        self.saver.save(step, self.train_step, last=last, extra={"guard": self.guard.state()})

    def _diverged(self, step: int, found: str, works: str = "often a lower --lr") -> DivergedError:
        """Every rank raises it, or none does."""
        self.saver.settle()
        saved = self.saver.saved
        last = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint"
        return DivergedError(f"step {step}: {found}; {last} (works: {works})")


def any_rank_stops(stop: StopRequest, group: dist.ProcessGroup) -> bool:
    """Whether any rank was asked to stop; the same answer on all of them.

    Args:
        stop: what this rank was asked.
        group: of all ranks, for CPU tensors.
    """
    asked = torch.tensor(int(stop.signal is not None))
    if group.size() > 1:
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=group)
    return bool(asked.item())


@contextmanager
def noted(text: str) -> Iterator[None]:
    """An exception from inside says where it was."""
    try:
        yield
    except Exception as error:
        error.add_note(text)
        raise


class _Clock:
    """Times steps; what lies between is not counted.

    Attributes:
        num_pairs: attended pairs of the steps since the means were last asked for.
    """

    def __init__(self) -> None:
        self._seconds, self._steps, self._begin = 0.0, 0, 0.0
        self.num_pairs = 0.0

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds += time.perf_counter() - self._begin
        self._steps += 1

    def means(self) -> tuple[float, float]:
        """Seconds and attended pairs of a step since the last time."""
        steps = max(1, self._steps)
        means = self._seconds / steps, self.num_pairs / steps
        self._seconds, self._steps, self.num_pairs = 0.0, 0, 0.0
        return means
