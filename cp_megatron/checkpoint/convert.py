"""The work of ``launch/convert.py``: turns checkpoints of all kinds into Hugging Face folders.

Importing this module does not load torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cp_megatron.checkpoint.gguf_convert import WeightType, convert_gguf
from cp_megatron.checkpoint.hf_folder import check_output, safetensors_header
from cp_megatron.cli.programs import CONVERT, ConversionOptions, refuse_unread
from cp_megatron.config import Config
from cp_megatron.config.files.foreign_folders import (
    DCP_METADATA,
    FROM_GGUF,
    FROM_TORCH,
    LOAD_HF,
    recognize,
)
from cp_megatron.errors import ConfigError

_READ = (FROM_GGUF, FROM_TORCH, "--load", LOAD_HF, "--output", "--dtype", "--bf16")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A folder that was written.

    Attributes:
        folder: its path.
        left_out: what of the source is not in it, such as ``optimizer``.
    """

    folder: Path
    left_out: tuple[str, ...] = ()

    def report(self) -> str:
        """Says what the folder holds, by the headers of its files."""
        files = [path for path in self.folder.iterdir() if path.is_file()]
        weights = sorted(path.name for path in files if path.suffix == ".safetensors")
        headers = [safetensors_header(self.folder, name) for name in weights]
        tensors = [tensor for header in headers for tensor in header.values()]
        dtypes = "/".join(sorted({dtype for dtype, _ in tensors}))
        numel = sum(math.prod(shape) for _, shape in tensors)
        size = sum(path.stat().st_size for path in files)
        config = json.loads((self.folder / "config.json").read_bytes())
        (architecture,) = config["architectures"]
        lines = [
            f"written  {self.folder}",
            f"format   Hugging Face folder, {architecture}, safetensors in {dtypes}",
            f"size     {numel:,} parameters, {size:,} bytes ({size / 1e6:,.1f} MB) in "
            f"{len(files)} files",
        ]
        if self.left_out:
            lines.append(f"left out {', '.join(self.left_out)}: a folder holds weights only")
        return "\n".join(lines)


def convert(config: Config, options: ConversionOptions, *, given: Collection[str]) -> Conversion:
    """Writes the folder that the flags ask for.

    Args:
        config: ``--load``, ``--load-hf`` and ``--dtype`` are read. The weights are float32 unless
            the user gave a dtype, whatever dtype a run computed in.
        options: the flags of the program.
        given: the flags that the user typed.

    Raises:
        ConfigError: the flags do not fit together, or the conversion is not possible.
    """
    refuse_unread(given, _READ, CONVERT)
    source = _source(config, options)
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
    if options.from_gguf is not None:
        return Conversion(folder=convert_gguf(source, output, dtype=dtype))
    if options.from_torch is not None:
        from cp_megatron.checkpoint.torch_import import import_torch  # imports torch

        model = Path(str(config.checkpoint.load_hf))
        left_out = import_torch(source, model, output, dtype=dtype)
        return Conversion(folder=output, left_out=left_out)
    from cp_megatron.checkpoint.hf_export import export_hf  # imports torch

    return Conversion(folder=export_hf(source, output, dtype=dtype))


def _source(config: Config, options: ConversionOptions) -> Path:
    """The one file or folder to convert."""
    load, load_hf = config.checkpoint.load, config.checkpoint.load_hf
    sources = {FROM_GGUF: options.from_gguf, FROM_TORCH: options.from_torch, "--load": load}
    named = {flag: path for flag, path in sources.items() if path is not None}
    if len(named) != 1:
        flag = next(iter(named), FROM_GGUF)
        rule = f"names what to convert: give one of {', '.join(sources)}"
        raise ConfigError(flag, named.get(flag, ""), rule, f"{FROM_GGUF} FILE.gguf")
    ((flag, source),) = named.items()
    if flag == FROM_TORCH and (foreign := recognize(flag, source)) is not None:
        raise foreign
    path = Path(source)
    # Unlike Path.is_file, os.path.isfile raises nothing for a name that is too long.
    if flag == FROM_TORCH and not any(map(os.path.isfile, (path, path / DCP_METADATA))):
        rule = "holds no checkpoint of torch" if os.path.isdir(path) else "does not exist"
        works = f"a folder with {DCP_METADATA}, or a file of torch.save"
        raise ConfigError(flag, source, rule, works)
    if flag == FROM_TORCH and load_hf is None:
        rule = "does not say what the model is: its number of heads, its rotary base"
        raise ConfigError(flag, source, rule, f"{LOAD_HF} with a folder that has its config.json")
    if flag != FROM_TORCH and load_hf is not None:
        rule = f"has no effect with {flag}, which has a configuration"
        raise ConfigError(LOAD_HF, load_hf, rule, "leave it out")
    return path
