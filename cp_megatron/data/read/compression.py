"""Opens packed files: gzip, bzip2, xz and Zstandard. The content decides, not the name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, cast

from cp_megatron.errors import ConfigError

Codec = Literal["gzip", "bzip2", "xz", "Zstandard"]
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_BEGINNINGS: Mapping[Codec, str] = {
    "gzip": r"\x1f\x8b\x08",
    "bzip2": r"BZh[1-9](1AY&SY|\x17\x72\x45\x38)",  # the second one is of an empty file
    "xz": r"\xfd7zXZ\0",
    "Zstandard": r"\x28\xb5\x2f\xfd",
}
_CHUNK = 1 << 20


def codec_of(path: str) -> Codec | None:
    """How a file is compressed; None if it is not.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as stream:
        head = stream.read(16).decode("latin-1")
    return next((codec for codec, begin in _BEGINNINGS.items() if re.match(begin, head)), None)


def name_unpacked(path: str) -> str:
    """The name that the content has: in lower case, without the suffix of the packing."""
    name = path.lower()
    return next((name.removesuffix(end) for end in PACKED_SUFFIXES if name.endswith(end)), name)


@contextmanager
def open_unpacked(path: str, flag: str) -> Iterator[BinaryIO]:
    """Opens the content of a file, packed or not.

    Args:
        path: the file.
        flag: the flag that named it, for messages.

    Raises:
        ConfigError: the file cannot be read or is damaged, or its package is not installed.
    """
    try:
        with _opened(path, flag, codec_of(path)) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        rule = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(flag, path, rule, "a complete and readable file") from None


def _opened(path: str, flag: str, codec: Codec | None) -> BinaryIO:
    if codec == "Zstandard":
        return _zstandard(path, flag)
    if codec is None:
        return open(path, "rb")
    openers: Mapping[Codec, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    return cast(BinaryIO, openers[codec](path, "rb"))


def _zstandard(path: str, flag: str) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        rule = "is packed by Zstandard and needs the package zstandard, which is not installed"
        works = "pip install 'cp_megatron[data]', or zstd -d"
        raise ConfigError(flag, path, rule, works) from None

    def chunks() -> Iterator[bytes]:
        # By frames, because the package's own reader takes a file that is cut for a whole one.
        with open(path, "rb") as file:
            data = file.read(_CHUNK)
            while data:
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                while True:
                    try:
                        yield frame.decompress(data)
                    except zstandard.ZstdError as error:
                        raise OSError(str(error)) from None
                    if frame.eof:
                        data = frame.unused_data or file.read(_CHUNK)
                        break
                    data = file.read(_CHUNK)
                    if not data:
                        raise EOFError("the file ends inside a frame")

    return io.BufferedReader(_Chunks(chunks()))


class _Chunks(io.RawIOBase):
    """A stream of the bytes that an iterator yields."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
