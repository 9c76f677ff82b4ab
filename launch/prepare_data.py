"""Turns documents into Megatron's .bin/.idx: ``python launch/prepare_data.py [FLAGS]``.

To continue a run that was stopped, give the same command again.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from cp_megatron.cli.refusal import refuse
from cp_megatron.data.prepare.prepare_command import PROGRAM, interrupted, parse, run
from cp_megatron.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns the exit code: 0 done, 2 a wrong flag or input, 130 stopped."""
    # A shell script that starts the program with & has it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _stop)
    try:
        run(parse(argv))
        return 0
    except ConfigError as error:
        return refuse(error, PROGRAM)
    except KeyboardInterrupt:
        print(interrupted(argv), file=sys.stderr, flush=True)
        return 130


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
