"""Trains a transformer: ``torchrun --nproc-per-node 4 launch/pretrain.py [FLAGS]``.

Flags are checked before torch is imported, so that a mistake is reported within a second.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence

from cp_megatron.cli.parse import PRETRAIN, read_arguments
from cp_megatron.cli.refusal import already_done, refuse
from cp_megatron.comm.garbage import collection_paused
from cp_megatron.comm.runtime import Launch
from cp_megatron.comm.signals import end_with_launcher, leave, stop_at_once
from cp_megatron.errors import ConfigError, FinishedError
from cp_megatron.memory.capacity import check_capacity
from cp_megatron.memory.memory_report import print_dry_run
from cp_megatron.preflight.check import check


def main(argv: Sequence[str], environ: Mapping[str, str], script: str = PRETRAIN.name) -> int:
    """Runs the program; returns 0, 1 if training failed, or 2 if a flag is wrong."""
    began = time.monotonic()
    stop_at_once()
    launch = Launch()
    try:
        launch = Launch.from_environment(environ)
        end_with_launcher(launch)
        arguments = read_arguments(argv, quiet=launch.rank != 0, again=launch.restarts > 0)
        plan = check(
            arguments.config,
            launch,
            dry_run=arguments.options.dry_run,
            dry_run_world_size=arguments.options.world_size,
            given=arguments.given,
            auto=arguments.auto,
            argv=argv,
            script=script,
            notes=arguments.notes,
            mistakes=arguments.mistakes,
        )
        plan = check_capacity(plan, launch, dry_run=arguments.options.dry_run)
        if arguments.options.dry_run:
            return 0 if launch.rank else print_dry_run(plan)
        with collection_paused():
            from cp_megatron.train.run import run

        return run(plan, launch, script, began)
    except FinishedError as error:
        return already_done(error, rank=launch.rank)
    except ConfigError as error:
        return refuse(error, PRETRAIN.name, rank=launch.rank)


if __name__ == "__main__":
    leave(main(sys.argv[1:], os.environ, sys.argv[0]))
