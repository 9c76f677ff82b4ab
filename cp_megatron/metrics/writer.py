"""Writes a run's metrics to metrics.jsonl, TensorBoard and, if requested, Weights & Biases."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path

import torch

from cp_megatron.config.files.run_folders import EXPERTS_FILE, METRICS_FILE
from cp_megatron.metrics.wandb_log import WandbRun

_LATER = 1.05
"""The tokens of experts are written at steps whose numbers grow by this factor at least."""
# Dense bfloat16 FLOP/s from the data sheets.
_PEAK_FLOPS = (("A100", 312e12), ("H100", 989e12), ("H200", 989e12), ("B200", 2250e12))


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One logged step; times are means over the steps since the previous logged one."""

    step: int
    loss: float  # nats per token of this step's global batch
    grad_norm: float  # global gradient norm before clipping
    lr: float  # learning rate of this step
    tokens: int  # tokens trained on since the run began
    tokens_per_second: float  # over all ranks
    step_seconds: float
    mfu: float | None  # model FLOP/s over the peak of the devices; None if that is not known (CPU)
    memory_bytes: int  # the largest peak of any rank: allocated on CUDA, resident on CPU
    valid_loss: float | None = None  # nats per token of the validation part, if it was read
    params_norm: float | None = None  # L2 norm of all parameters after the step, if asked for
    num_zeros_in_grad: int | None = None  # numbers of the gradient that are 0, if asked for
    moe_aux_loss: float | None = None  # what the imbalance of experts added to the trained loss
    moe_z_loss: float | None = None  # what the z-loss of routers added to it
    moe_expert_load: float | None = None  # tokens of the busiest expert over the mean of a layer
    moe_rank_load: float | None = None  # the same for ranks that share experts
    moe_counts: tuple[tuple[int, ...], ...] | None = None  # tokens of each expert, layer by layer


class MetricsWriter:
    """Appends to the run's files.

    Steps that a killed run logged after ``start_step`` will be trained again. Their lines are
    removed from ``metrics.jsonl``, of which a copy is kept, and TensorBoard hides their events.

    Args:
        folder: the run's folder.
        start_step: steps finished before the run started.
        wandb: receives every line as well.
    """

    def __init__(self, folder: Path, *, start_step: int, wandb: WandbRun | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # ranks that write nothing do without

        self.wandb = wandb
        for name in (METRICS_FILE, EXPERTS_FILE):
            _forget_after(folder / name, start_step)
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._last: dict[str, object] = {}  # the last line
        self._begin = 0  # where it begins in the file
        self._experts = folder / EXPERTS_FILE
        self._experts_step = _last_step(self._experts)
        self._board = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, metrics: Metrics) -> None:
        """Writes one line; it is flushed to the operating system when this returns.

        A second line of the same step replaces the first one, of which it repeats all numbers.
        """
        self._write_counts(metrics)
        row = asdict(replace(metrics, moe_counts=None))
        absent = (field.name for field in fields(metrics) if field.default is None)
        for name in list(absent):
            if row[name] is None:
                del row[name]
        line = json.dumps(row, allow_nan=False) + "\n"
        before, self._last = self._last, row
        if again := before.get("step") == metrics.step:
            self._file.truncate(self._begin)
        self._begin = os.fstat(self._file.fileno()).st_size
        self._file.write(line)
        self._file.flush()
        new = {name: value for name, value in row.items() if not again or name not in before}
        for name, value in new.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, metrics.step)
        if self.wandb is not None:
            self.wandb.write({"step": metrics.step, **new})

    def _write_counts(self, metrics: Metrics) -> None:
        """Writes the tokens of every expert, unless a step shortly before was written.

        48 layers of 128 experts are a line of about 40 KB. 100,000 steps, of which every tenth is
        logged, have some 150 lines.
        """
        if metrics.moe_counts is None or metrics.step < _LATER * self._experts_step:
            return
        self._experts_step = metrics.step
        line = json.dumps({"step": metrics.step, "counts": metrics.moe_counts}) + "\n"
        with self._experts.open("a", encoding="utf-8") as file:
            file.write(line)

    def close(self, *, failed: bool = False) -> None:
        """Writes what is buffered and closes the files; ``failed``: the run ended with an error."""
        self._file.close()
        self._board.close()
        if self.wandb is not None:
            self.wandb.close(failed=failed)


def _forget_after(file: Path, step: int) -> None:
    """Removes the lines of later steps and incomplete lines; keeps a copy of the old file."""
    if not file.exists():
        return
    text = file.read_text(encoding="utf-8")
    kept = "".join(line for line in text.splitlines(keepends=True) if _is_of(line, step))
    if kept != text:
        new = file.with_suffix(".tmp")
        new.write_text(kept, encoding="utf-8")
        keep_aside(file, step)
        new.replace(file)


def _last_step(file: Path) -> int:
    """The step of the last line; 0 if there is none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _is_of(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


def keep_aside(file: Path, step: int) -> Path:
    """Copies ``name.ext`` to ``name-step-N.ext`` or, if that exists, to ``name-step-N.M.ext``.

    Args:
        file: the file, which is about to be replaced.
        step: N, the step from which the run continues with another file.
    """
    numbers = ("" if number == 1 else f".{number}" for number in count(1))
    names = (file.with_name(f"{file.stem}-step-{step}{x}{file.suffix}") for x in numbers)
    aside = next(name for name in names if not os.path.lexists(name))
    shutil.copyfile(file, aside)
    return aside


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_FLOPS if key in name), None)


def peak_memory(device: torch.device) -> int:
    """This rank's peak so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
