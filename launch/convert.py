"""Converts a model: ``python launch/convert.py --from-gguf FILE.gguf --output DIR``.

Instead of a GGUF file it takes a run (``--load RUN``) or what torch and torchtitan write
(``--from-torch DIR --load-hf CONFIG``). The result is a folder that transformers reads:
configuration, weights, tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast

from cp_megatron.checkpoint.convert import convert
from cp_megatron.cli.parse import parse_arguments
from cp_megatron.cli.programs import CONVERT, ConversionOptions
from cp_megatron.cli.refusal import refuse
from cp_megatron.errors import ConfigError
from cp_megatron.train.signals import leave, stop_at_once


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns the exit code: 0 done, 2 a flag or a file cannot be used."""
    stop_at_once()
    try:
        arguments = parse_arguments(argv, program=CONVERT)
        options = cast(ConversionOptions, arguments.options)
        print(convert(arguments.config, options, given=arguments.given).report())
        return 0
    except ConfigError as error:
        return refuse(error, CONVERT.name)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
