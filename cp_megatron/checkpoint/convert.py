"""The work of ``launch/convert.py``: turns a GGUF file or a checkpoint into a Hugging Face folder.

Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cp_megatron.checkpoint.gguf_convert import WeightType, convert_gguf
from cp_megatron.checkpoint.hf_folder import check_output
from cp_megatron.cli.programs import CONVERT, ConversionOptions, refuse_unread
from cp_megatron.config import Config
from cp_megatron.errors import ConfigError

_READ = ("--from-gguf", "--load", "--output", "--dtype", "--bf16")


def convert(config: Config, options: ConversionOptions, *, given: Collection[str]) -> Path:
    """Writes the folder that the flags ask for, and returns its path.

    Args:
        config: ``--load`` and ``--dtype`` are read. The weights are float32 unless the user gave a
            dtype, whatever dtype a run computed in.
        options: the flags of the program.
        given: the flags that the user typed.

    Raises:
        ConfigError: the flags do not fit together, or the conversion is not possible.
    """
    refuse_unread(given, _READ, CONVERT)
    load, source = config.checkpoint.load, options.from_gguf
    if (source is None) == (load is None):
        rule = "names what to convert, as --load does: give one of the two"
        raise ConfigError("--from-gguf", source or "", rule, "--from-gguf FILE.gguf")
    if options.output is None:
        raise ConfigError("--output", "", "names the folder to write", "--output DIR")
    output = Path(options.output)
    check_output(output)
    dtype: WeightType = "float32"
    if {"--dtype", "--bf16"} & set(given) and config.train.dtype != "auto":
        if config.train.dtype == "float64":
            rule = "is not a dtype that Hugging Face folders are used with"
            raise ConfigError("--dtype", "float64", rule, "float32, bfloat16")
        dtype = config.train.dtype
    if source is not None:
        return convert_gguf(source, output, dtype=dtype)
    assert load is not None
    from cp_megatron.checkpoint.hf_export import export_hf  # imports torch

    return export_hf(Path(load), output, dtype=dtype)
