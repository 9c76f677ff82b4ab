"""Trains a transformer: ``torchrun --nproc-per-node 4 launch/pretrain.py [FLAGS]``.

Flags and settings are checked before torch is imported: a mistake costs less than a second and one
line on standard error, and every rank ends with code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from cp_megatron.comm.runtime import Launch
from cp_megatron.config.parse import parse_arguments
from cp_megatron.errors import ConfigError
from cp_megatron.train.preflight import check
from cp_megatron.train.report import error_line, print_start

PROGRAM = "pretrain.py"


def main(
    argv: Sequence[str], environ: Mapping[str, str], script: str = "launch/pretrain.py"
) -> int:
    """Runs the program; the exit code: 0 done, 2 a flag or setting can not be honoured."""
    rank = 0
    try:
        launch = Launch.from_environment(environ)
        rank = launch.rank
        arguments = parse_arguments(argv, program=PROGRAM, quiet=rank != 0)
        plan = check(
            arguments.config,
            launch,
            dry_run=arguments.dry_run,
            dry_run_world_size=arguments.world_size,
            given=arguments.given,
            argv=argv,
            script=script,
        )
        if arguments.dry_run:
            if rank == 0:
                print_start(plan, None)
            return 0
        from cp_megatron.train.run import run

        return run(plan, launch)
    except ConfigError as error:
        if rank == 0:
            print(error_line(error, PROGRAM), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ, sys.argv[0]))
