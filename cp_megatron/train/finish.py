"""The lines after the last step: where the files are, and the command that continues the run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from cp_megatron.checkpoint.step_folders import step_folder
from cp_megatron.comm.runtime import Launch
from cp_megatron.config.files.run_folders import METRICS_FILE
from cp_megatron.metrics.plots import INSTALL, draw_curves, draw_experts, has_matplotlib
from cp_megatron.preflight.run_length import length_flag
from cp_megatron.train.loop import Trainer


def print_end(trainer: Trainer, launch: Launch, script: str, last: int) -> None:
    """Prints the lines and draws the curves, on rank 0.

    Args:
        trainer: it has ended without an error, and its metrics are closed.
        launch: how this process was started.
        script: the program as the user called it.
        last: the last finished step.
    """
    if trainer.writer is None:
        return
    folder, view, steps = trainer.folder, trainer.view, trainer.plan.last_step
    view.say(f"checkpoint  {step_folder(folder, last)}")
    view.say(f"metrics     {folder / METRICS_FILE}, or: tensorboard --logdir {folder}")
    if trainer.writer.wandb is not None and trainer.writer.wandb.link:
        view.say(f"wandb       {trainer.writer.wandb.link}")
    show_curves(trainer)
    words = [*launcher(launch), script, "--load", str(folder)]
    if last < steps:
        view.say(f"stopped after step {last}; continue with:\n  {shlex.join(words)}")
    else:
        words += length_flag(trainer.plan, 2)
        view.say(f"finished {last} steps; train longer with:\n  {shlex.join(words)}")


def show_curves(trainer: Trainer) -> None:
    """Draws the run's curves and the work of its experts unless ``--no-plot`` is set, on rank 0."""
    if trainer.writer is None or not trainer.plan.config.log.plot:
        return
    if not has_matplotlib():
        trainer.view.say(f"curves      not drawn, that needs: {INSTALL}")
        return
    for name, draw in (("curves", draw_curves), ("experts", draw_experts)):
        try:
            picture: object = draw(trainer.folder)
        except (
            Exception
        ) as error:  # a missing picture must not turn a finished run into a failed one
            picture = f"not drawn: {error}"
        if picture is not None:
            trainer.view.say(f"{name:<12}{picture}")


def launcher(launch: Launch) -> list[str]:
    """The beginning of a command that starts as many ranks again."""
    if not launch.under_torchrun:
        return [Path(sys.executable).name]
    words = ["torchrun", "--nproc-per-node", str(launch.local_world_size)]
    if launch.nodes > 1:
        words += ["--nnodes", str(launch.nodes), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", "HOST:PORT"]
    return words
