"""Prints and draws a schedule: ``python -m cp_megatron.plan --help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cp_megatron.errors import ConfigError
from cp_megatron.plan.show.command import PROGRAM, parse, run


def main(argv: Sequence[str]) -> int:
    """Runs the program. Returns the exit code: 0 on success, 2 for an invalid flag."""
    try:
        run(parse(argv))
    except ConfigError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
