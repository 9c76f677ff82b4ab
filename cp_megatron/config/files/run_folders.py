"""The folders of runs: which one ``--load`` names, which checkpoint it goes on from.

With ``--load auto`` the same words begin a run and go on with it, however often they are said.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from pathlib import Path

from cp_megatron.errors import ConfigError

AUTO = "auto"
RUNS = Path("runs")
"""Where a run is kept that nobody named a folder for."""
CONFIG_FILE = "config.yaml"
"""The file in a run's folder that holds its configuration."""
METRICS_FILE = "metrics.jsonl"
"""The file in a run's folder with a line per logged step."""
STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]*)")
"""The name of a finished checkpoint."""


def find_run(load: str | None, save: str | None, *, again: bool) -> tuple[str | None, bool]:
    """What to load, None to begin; and whether that was found out here.

    Args:
        load, save: the flags.
        again: a launcher starts the same words again after a failure; what was saved meanwhile goes
            before what the run began with.

    Raises:
        ConfigError: ``auto`` without a folder to look into.
    """
    if load == AUTO and save is None:
        rule = "needs the folder to look into"
        raise ConfigError("--load", load, rule, "--load auto --save RUN")
    if save is None or not (load == AUTO or again):
        return load, False
    if has_checkpoint(Path(save)):
        return save, True
    return None if load == AUTO else load, True


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder has a checkpoint, whole or not."""
    steps = [step for step in folder.glob("step-*") if STEP_FOLDER.fullmatch(step.name)]
    return (folder / CONFIG_FILE).is_file() and bool(steps)


def run_folder(path: Path) -> Path:
    """The run's folder that ``--load`` names: ``path`` itself, or the parent of a ``step-N``."""
    return path.parent if STEP_FOLDER.fullmatch(path.name) else path


def runs_near(path: Path) -> str:
    """The runs that lie beside a folder that is none."""
    with contextlib.suppress(OSError):
        runs = [file.parent for file in path.parent.glob(f"*/{CONFIG_FILE}")]
        names = difflib.get_close_matches(path.name, [run.name for run in runs], cutoff=0.3)
        return ", ".join(str(path.parent / name) for name in names)
    return ""
