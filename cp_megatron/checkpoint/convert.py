"""What ``launch/convert.py`` does: one format of a model into another. No torch until it is
known that a checkpoint is to be read.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cp_megatron.checkpoint.gguf import check_package
from cp_megatron.checkpoint.gguf_convert import WeightType, check_output, convert_gguf
from cp_megatron.cli.programs import CONVERT, ConversionOptions, refuse_unread
from cp_megatron.config import Config
from cp_megatron.errors import ConfigError

_READ = ("--from-gguf", "--load", "--output", "--dtype", "--bf16")


def convert(config: Config, options: ConversionOptions, *, given: Collection[str]) -> Path:
    """Writes the folder that the flags ask for; its path.

    Args:
        config: ``--load`` is read, and ``--dtype`` where it is given; it is float32 by default,
            whatever a run was computed in.
        options: the flags of the program.
        given: the flags the user typed.

    Raises:
        ConfigError: the flags do not fit together, or the conversion is not possible.
    """
    refuse_unread(given, _READ, CONVERT)
    load, source = config.checkpoint.load, options.from_gguf
    if (source is None) == (load is None):
        rule = "says what to convert, as --load does: one of the two"
        raise ConfigError("--from-gguf", source or "", rule, "--from-gguf FILE.gguf")
    if options.output is None:
        raise ConfigError("--output", "", "says where the folder goes", "--output DIR")
    output = Path(options.output)
    check_output(output)
    kind: WeightType = "float32"
    if {"--dtype", "--bf16"} & set(given) and config.train.dtype != "auto":
        if config.train.dtype == "float64":
            rule = "is more than a Hugging Face folder is used with"
            raise ConfigError("--dtype", "float64", rule, "float32, bfloat16")
        kind = config.train.dtype
    if source is not None:
        check_package()
        return convert_gguf(source, output, dtype=kind)
    assert load is not None
    from cp_megatron.checkpoint.hf_export import export_hf  # imports torch

    return export_hf(Path(load), output, dtype=kind)
