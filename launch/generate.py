"""Generates text with a trained model: ``python launch/generate.py --load RUN [--prompt TEXT]``.

Flags are checked before torch is imported, so that a mistake is reported within a second.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import cast

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.cli.programs import GENERATE, GenerationOptions
from cp_megatron.cli.refusal import refuse
from cp_megatron.comm.garbage import collection_paused
from cp_megatron.comm.runtime import Launch
from cp_megatron.comm.signals import leave, stop_at_once
from cp_megatron.errors import ConfigError
from cp_megatron.generate.check_generation import check_generation


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs the program; returns 0, 2 if a flag is wrong, or 130 if it was interrupted."""
    stop_at_once()
    launch = Launch()
    try:
        launch = Launch.from_environment(environ)
        arguments = parse_arguments(argv, program=GENERATE, quiet=launch.rank != 0)
        options = cast(GenerationOptions, arguments.options)
        setup = check_generation(arguments.config, options, launch, given=arguments.given)
        with collection_paused():
            from cp_megatron.generate.run_generation import run_generation

        signal.signal(signal.SIGINT, signal.default_int_handler)  # ends an answer
        return run_generation(setup)
    except KeyboardInterrupt:
        return 130
    except ConfigError as error:
        return refuse(error, GENERATE.name, rank=launch.rank)


if __name__ == "__main__":
    leave(main(sys.argv[1:], os.environ))
