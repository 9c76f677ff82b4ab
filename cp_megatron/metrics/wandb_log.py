"""Metrics sent to Weights & Biases. The one file that imports wandb, which is optional.

A run that goes on in its folder goes on there too: the folder keeps the id. Whatever fails here is
one warning; the training never ends for it.
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
"""The file in a run's folder: the place there, ``entity/project``, and the run's id in it."""
SECONDS_TO_START = 60
SECONDS_TO_FINISH = 120


class WandbRun:
    """The run there, on one rank.

    The training's steps are given as a number of their own, ``step``, against which all others are
    drawn: Weights & Biases' own counter can not go back, as a run killed after its checkpoint does.

    Args:
        log: the flags, with a project.
        folder: the run's folder.
        settings: what the run is, shown beside its curves.

    Attributes:
        place: its address, or the command that sends it from a machine without a network; empty
            where it did not start.
    """

    def __init__(self, log: LogConfig, *, folder: Path, settings: Mapping[str, Any]) -> None:
        self.place = ""
        self._run: Any = None
        try:
            self._run = _start(log, folder, settings)
            offline = f"wandb sync {self._run.settings.sync_dir}"
            self.place = offline if self._run.offline else self._run.url
        except Exception as error:  # by intent any: a login, a network, a disk, their program
            self._give_up("did not start", error)

    def write(self, row: Mapping[str, Any]) -> None:
        """Hands one line of metrics to wandb's own process; waits for no network."""
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in row.items() if value is not None})
        except Exception as error:
            self._give_up("stopped", error)

    def close(self, *, failed: bool = False) -> None:
        """Sends what is left, for two minutes at most; their files stay on the disk.

        Args:
            failed: how the run is marked there.
        """
        run, self._run = self._run, None
        if run is None:
            return
        errors: list[Exception] = []

        def finish() -> None:
            try:
                run.finish(exit_code=int(failed))
            except Exception as error:
                errors.append(error)

        # Without a network it would try for ever.
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
        text = f"warning: Weights & Biases {what}, the training goes on without it: {reason}"
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
        settings=wandb.Settings(
            console="off",  # what the run prints stays this program's
            silent=True,
            init_timeout=SECONDS_TO_START,
            login_timeout=SECONDS_TO_START,
        ),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _run_id(log: LogConfig, folder: Path) -> str:
    """The id that the folder keeps for this project; a fresh one is kept from now on."""
    file, place = folder / ID_FILE, f"{log.wandb_entity or ''}/{log.wandb_project}"
    known: dict[str, str] = {}
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
    if place not in known:
        known[place] = secrets.token_hex(4)
        new = file.with_suffix(".tmp")
        new.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        new.replace(file)
    return known[place]
