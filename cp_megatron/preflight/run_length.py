"""How long a run is: its last step, from steps, rows or passes over its data.

A run that continues may have another batch size or row length than before, so its place in the data
is the number of rows that the checkpoint counts, and its tokens are counted there too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from cp_megatron.checkpoint.manifest import Manifest
from cp_megatron.data.rows.corpora import open_data
from cp_megatron.data.rows.small_data import is_small
from cp_megatron.errors import ConfigError, FinishedError
from cp_megatron.preflight.run_plan import RunPlan

TOKENS = "tokens"
"""The key of the number of tokens in what a checkpoint keeps besides tensors."""


def continued_from(plan: RunPlan, folder: Path, manifest: Manifest) -> RunPlan:
    """The plan of a run that continues from a checkpoint; ``with_last_step`` completes it."""
    tokens = manifest.extra.get(TOKENS)
    if not isinstance(tokens, int):  # written before tokens were counted
        data = manifest.config.get("data")
        length = data.get("seq_length") if isinstance(data, dict) else None
        known = length if isinstance(length, int) else plan.config.data.seq_length
        tokens = manifest.consumed * known
    rows, step = manifest.consumed, manifest.step
    return replace(plan, load=folder, load_step=step, load_rows=rows, load_tokens=tokens)


def with_last_step(plan: RunPlan) -> RunPlan:
    """The plan with its last step. Only ``--train-epochs`` reads the data for that.

    Raises:
        ConfigError: nothing says how long the run is, it has not a single step, or the data cannot
            be used.
    """
    train = plan.config.train
    if train.train_epochs is not None:
        data = plan.data or open_data(plan.config.data, seed=train.seed)
        plan = replace(plan, data=data, rows_per_epoch=data.rows.train.rows_per_epoch)
        steps = math.ceil(_rows_to_come(plan) / plan.rows_per_step)
    elif train.train_samples is not None:
        steps = math.floor(_rows_to_come(plan) / plan.rows_per_step)
        if not steps and plan.load is None:
            rule = f"is not one batch of --global-batch-size {plan.rows_per_step}"
            works = str(plan.rows_per_step)
            raise ConfigError("--train-samples", train.train_samples, rule, works)
    elif train.train_iters is not None:
        return replace(plan, last_step=train.train_iters)
    else:
        rule = "says how long the run is, unless --train-samples or --train-epochs does"
        raise ConfigError("--train-iters", None, rule, "--train-iters 200")
    return replace(plan, last_step=plan.load_step + max(0, steps))


def with_rows(plan: RunPlan) -> RunPlan:
    """The plan of a dry run with what its data is known to be, if that is small.

    Raises:
        ConfigError: the data is malformed.
    """
    if plan.rows_per_epoch is not None or not is_small(plan.config.data):
        return plan
    try:
        data = open_data(plan.config.data, seed=plan.config.train.seed)
    except ConfigError as error:
        if error.flag not in ("--seq-length", "--split"):
            raise
        # A dry run may plan for more data than is here.
        return replace(
            plan, notes=(*plan.notes, f"with this data the run would be refused: {error}")
        )
    rows = data.rows.train.rows_per_epoch
    return replace(plan, rows_per_epoch=rows, notes=(*plan.notes, *data.notes))


def _rows_to_come(plan: RunPlan) -> Fraction:
    """Rows between the checkpoint, if any, and the end that rows or epochs say."""
    train = plan.config.train
    if train.train_epochs is not None:
        # The decimal number that the user wrote: 1.1 epochs of 10 rows are 11 rows.
        rows = Fraction(str(train.train_epochs)) * (plan.rows_per_epoch or 0)
    else:
        rows = Fraction(train.train_samples or 0)
    return rows - plan.load_rows


def length_flag(plan: RunPlan, factor: int = 1) -> tuple[str, str]:
    """The flag that says how long the run is, and its value, multiplied by ``factor``."""
    train = plan.config.train
    if train.train_epochs is not None:
        return "--train-epochs", f"{factor * train.train_epochs:.15g}"
    if train.train_samples is not None:
        return "--train-samples", str(factor * train.train_samples)
    return "--train-iters", str(factor * plan.last_step)


def check_unfinished(plan: RunPlan, *, auto: bool = False) -> None:
    """Checks that something is left to train.

    Raises:
        FinishedError: ``auto``, and the run is finished.
        ConfigError: the run is finished.
    """
    if plan.load_step < plan.last_step or plan.load is None:
        return
    flag, value = length_flag(plan)
    works = {
        "--train-iters": plan.load_step + plan.last_step,
        "--train-samples": plan.load_rows + max(plan.rows_per_step, int(float(value))),
        "--train-epochs": math.ceil(plan.load_rows / (plan.rows_per_epoch or 1) + float(value)),
    }[flag]
    rule = f"the run is already at step {plan.load_step}"
    if flag != "--train-iters":
        rule += f" and row {plan.load_rows:,}"
    kind = FinishedError if auto else ConfigError
    raise kind(flag, value, f"{rule}; to continue, this must be larger", str(works))


def epochs_line(plan: RunPlan) -> str:
    """The number of rows of the data and of passes over them; empty until the data is read."""
    rows = plan.rows_per_epoch
    if not rows:
        return ""
    epochs = plan.rows_of(plan.last_step).stop / rows
    plural = "" if rows == 1 else "s"
    return f"{rows:,} row{plural}, {epochs:,.3g} epochs in {plan.last_step:,} steps"


def repetition(plan: RunPlan) -> Iterator[str]:
    """A note if the run sees its data more than once."""
    rows, seen = plan.rows_per_epoch or 0, plan.rows_of(plan.last_step).stop
    if 0 < rows < seen:
        times = f"{seen // rows:,}" + (f" or {seen // rows + 1:,}" if seen % rows else "")
        each = "its only row" if rows == 1 else f"each of its {rows:,} rows"
        yield f"the data repeats: the run trains {times} times on {each}"
