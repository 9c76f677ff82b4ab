"""Progress on the console: one line per logged step and, on a terminal, a live bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cp_megatron.metrics.writer import Metrics


class ProgressView:
    """Prints the progress unless ``quiet``; a context manager around the loop."""

    def __init__(self, console: Console, *, quiet: bool, start_step: int, train_iters: int) -> None:
        self.console, self._quiet, self._total = console, quiet, train_iters
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None)
        more = TextColumn("{task.description}"), TextColumn("eta"), TimeRemainingColumn()
        hidden = quiet or not console.is_terminal
        self._bar = Progress(
            *columns, *more, console=console, expand=True, transient=True, disable=hidden
        )
        self._task = self._bar.add_task("", total=train_iters, completed=start_step)

    def __enter__(self) -> ProgressView:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def step_done(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def log(self, metrics: Metrics) -> None:
        if self._quiet:
            return
        rate = f"{metrics.tokens_per_second:,.0f} tok/s"
        memory = f"{metrics.memory_bytes / 2**30:.2f} GiB"
        step = f"step {metrics.step:>{len(str(self._total))}}/{self._total}"
        parts = [step, f"loss {metrics.loss:.4f}", f"grad {metrics.grad_norm:.3f}"]
        parts += [f"lr {metrics.lr:.2e}", rate, memory]
        if metrics.params_norm is not None:
            parts.append(f"params {metrics.params_norm:.3f}")
        if metrics.num_zeros_in_grad is not None:
            parts.append(f"zeros {metrics.num_zeros_in_grad:,}")
        if metrics.moe_expert_load is not None:
            parts.append(f"busiest expert {metrics.moe_expert_load:.2f}")
        if metrics.mfu is not None:
            parts.append(f"mfu {metrics.mfu:.1%}")
        if metrics.valid_loss is not None:
            parts.append(f"valid {metrics.valid_loss:.4f}")
        self.console.print("  ".join(parts), highlight=False, soft_wrap=True)
        self._bar.update(self._task, description=f"loss {metrics.loss:.3f}  {rate}  {memory}")

    def say(self, text: str) -> None:
        if not self._quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
