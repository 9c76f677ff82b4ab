"""Evaluates a model on long rows: ``torchrun --nproc-per-node 2 launch/evaluate.py --load RUN``.

Flags are checked before torch is imported, so that a mistake is reported within a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import cast

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.cli.programs import EVALUATE, EvaluationOptions
from cp_megatron.cli.refusal import refuse
from cp_megatron.comm.garbage import collection_paused
from cp_megatron.comm.runtime import Launch
from cp_megatron.comm.signals import end_with_launcher, leave, stop_at_once
from cp_megatron.errors import ConfigError
from cp_megatron.evaluate.check_evaluation import check_evaluation, print_setup


def main(argv: Sequence[str], environ: Mapping[str, str], script: str = EVALUATE.name) -> int:
    """Runs the program; returns 0, or 2 if a flag is wrong."""
    stop_at_once()
    launch = Launch()
    try:
        launch = Launch.from_environment(environ)
        end_with_launcher(launch)
        arguments = parse_arguments(argv, program=EVALUATE, quiet=launch.rank != 0)
        options = cast(EvaluationOptions, arguments.options)
        setup = check_evaluation(
            arguments.config, options, launch, given=arguments.given, argv=argv, script=script
        )
        if launch.rank == 0:
            print_setup(setup)
        if options.dry_run:
            return 0
        with collection_paused():
            from cp_megatron.evaluate.run_evaluation import run_evaluation

        return run_evaluation(setup, launch)
    except ConfigError as error:
        return refuse(error, EVALUATE.name, rank=launch.rank)


if __name__ == "__main__":
    leave(main(sys.argv[1:], os.environ, sys.argv[0]))
