"""Sends metrics to Weights & Biases. This is the only file that imports wandb, which is optional.

A run that continues in its folder also continues there, because the folder keeps its id. A failure
here is reported by one warning and never ends the training.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cp_megatron.config import LogConfig

ID_FILE = "wandb.json"
"""The file in a run's folder that maps ``entity/project`` to the run's id there."""
SECONDS_TO_FINISH = 120


class WandbRun:
    """A run on Weights & Biases, written by one rank.

    The training step is logged as a metric, ``step``, against which all others are drawn. The
    service's own counter cannot go back, as the step does when a killed run continues from its last
    checkpoint.

    Args:
        log: the flags, with a project.
        folder: the run's folder.
        settings: the run's settings, which are shown beside its curves.

    Attributes:
        link: its address, or the command that uploads it if there is no network; empty if it did
            not start.
    """

    def __init__(self, log: LogConfig, *, folder: Path, settings: Mapping[str, Any]) -> None:
        self.link = ""
        self._run: Any = None
        try:
            self._run = _start(log, folder, settings)
            where = self._run.settings.sync_dir
            self.link = f"wandb sync {where}" if self._run.offline else self._run.url
        except Exception as error:  # any error: login, network, disk, or wandb itself
            self._give_up("did not start", error)

    def write(self, row: Mapping[str, Any]) -> None:
        """Passes one line of metrics to wandb's own process, without waiting for the network."""
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in row.items() if value is not None})
        except Exception as error:
            self._give_up("stopped", error)

    def close(self, *, failed: bool = False) -> None:
        """Sends what remains, for at most two minutes; ``failed`` marks the run as failed."""
        run, self._run = self._run, None
        if run is None:
            return
        errors: list[Exception] = []

        def finish() -> None:
            try:
                run.finish(exit_code=int(failed))
            except Exception as error:
                errors.append(error)

        # Without a network, wandb would try forever.
        thread = threading.Thread(target=finish, name="wandb finish", daemon=True)
        thread.start()
        thread.join(SECONDS_TO_FINISH)
        if thread.is_alive():
            errors.append(TimeoutError(f"not everything was sent in {SECONDS_TO_FINISH} s"))
        if errors:
            self._give_up("did not finish", errors[0])

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split()) or type(error).__name__
        text = f"warning: Weights & Biases {what}, training continues without it: {reason}"
        print(text, file=sys.stderr, flush=True)


def _start(log: LogConfig, folder: Path, settings: Mapping[str, Any]) -> Any:
    import wandb

    save = Path(log.wandb_save_dir) if log.wandb_save_dir is not None else folder
    save.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=log.wandb_project,
        entity=log.wandb_entity,
        name=log.wandb_exp_name or folder.resolve().name,
        dir=str(save),
        id=_run_id(log, folder),
        resume="allow",
        config=dict(settings),
        # With console off, wandb does not capture what this program prints.
        settings=wandb.Settings(console="off", silent=True, init_timeout=60, login_timeout=60),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _run_id(log: LogConfig, folder: Path) -> str:
    """The id that the folder keeps for this project; a new one is stored first."""
    file, place = folder / ID_FILE, f"{log.wandb_entity or ''}/{log.wandb_project}"
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if place not in known:
        known[place] = secrets.token_hex(4)
        new = file.with_suffix(".tmp")
        new.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        new.replace(file)
    return known[place]
