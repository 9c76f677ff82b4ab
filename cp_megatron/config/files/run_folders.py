"""The folders of runs: which run ``--load`` names, and whether it has a checkpoint.

With ``--load auto --save RUN``, and with ``--load RUN --save RUN`` as in Megatron-LM, the same
command line begins a run and continues it.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from pathlib import Path

from cp_megatron.config.files.folder_lock import is_lock
from cp_megatron.errors import ConfigError

AUTO = "auto"
RUNS = Path("runs")
"""The folder for runs without ``--save``."""
CONFIG_FILE = "config.yaml"
"""The file in a run's folder that holds its configuration."""
METRICS_FILE = "metrics.jsonl"
"""The file in a run's folder with one line per logged step."""
EXPERTS_FILE = "experts.jsonl"
"""The file in a run's folder with the tokens of every expert, for some of the logged steps."""
STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]*)")
"""The name of a finished checkpoint."""


def find_run(load: str | None, save: str | None, *, again: bool) -> tuple[str | None, bool]:
    """The run to load (None to begin one), and whether it was looked for in ``--save``.

    Args:
        again: whether a launcher repeats the command line after a failure. Then a checkpoint that
            was saved meanwhile replaces what the run began with.

    Raises:
        ConfigError: ``--load auto`` without ``--save``.
    """
    if load == AUTO and save is None:
        raise ConfigError("--load", load, "needs the folder to look into", "--load auto --save RUN")
    if save is None:
        return load, False
    folder, own = Path(save), load == AUTO or _same(load, save)
    if not (own or again):
        return load, False
    steps = [step for step in folder.glob("step-*") if STEP_FOLDER.fullmatch(step.name)]
    if steps and (folder / CONFIG_FILE).is_file():
        return save, True
    # What else a folder may hold is told as for any other folder that is loaded.
    if load != AUTO and own and not (is_vacant(folder) or (folder / CONFIG_FILE).is_file()):
        return load, False
    return None if own else load, True


def _same(load: str | None, save: str) -> bool:
    return load is not None and os.path.realpath(load) == os.path.realpath(save)


def is_vacant(folder: Path) -> bool:
    """Whether the folder does not exist, or is empty but for a lock."""
    if not os.path.lexists(folder):
        return True
    with contextlib.suppress(OSError):
        return all(map(is_lock, folder.iterdir()))
    return False


def run_folder(path: Path) -> Path:
    """The folder of the run that ``path`` names: ``path`` itself, or the parent of a ``step-N``."""
    return path.parent if STEP_FOLDER.fullmatch(path.name) else path


def runs_near(path: Path) -> str:
    """The runs beside ``path`` with a similar name, for a message."""
    with contextlib.suppress(OSError):
        runs = [file.parent for file in path.parent.glob(f"*/{CONFIG_FILE}")]
        names = difflib.get_close_matches(path.name, [run.name for run in runs], cutoff=0.3)
        return ", ".join(str(path.parent / name) for name in names)
    return ""
