"""Text to token ids and back, whatever library the ids come from. No torch.

    --tokenizer-type    reads                                            needs
    byte                nothing: one id per byte of UTF-8, 256 ends      nothing
    huggingface         tokenizer.json, or the folder it lies in         tokenizers
    sentencepiece       a .model file                                    sentencepiece
    tiktoken            lines "base64 rank"                              tiktoken

Each library has one file beside this one, which is imported when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError

TYPE_FLAG = "--tokenizer-type"
MODEL_FLAG = "--tokenizer-model"
KINDS = ("byte", "huggingface", "sentencepiece", "tiktoken")
"""What ``--tokenizer-type`` takes."""
_WANTED: Mapping[str, str] = MappingProxyType(
    {
        "huggingface": "a tokenizer.json, or the folder of a Hugging Face model",
        "sentencepiece": "the .model file of a SentencePiece tokenizer",
        "tiktoken": 'a tiktoken file, whose lines are "base64 rank"',
    }
)

Ids = npt.NDArray[np.int32]


class Tokenizer(Protocol):
    """Text to ids and back.

    Special tokens that are spelled out in a text, such as ``<|im_start|>``, become their ids in
    ``huggingface`` and ``tiktoken``, as in transformers; nothing is added to a text.

    Attributes:
        kind: one of ``KINDS``.
        path: the file it was read from; None where there is none.
        vocab_size: ids lie in [0, vocab_size).
        eod: the id that ends every document.
        fingerprint: SHA-256 (hex) of what decides the ids.
    """

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    @property
    def opening(self) -> tuple[int, ...]:
        """Ids that a text to be continued begins with (Llama's BOS); rows of data have none."""

    def encode(self, text: str) -> Ids:
        """Ids of a text, int32 [n], without an end of document."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """``encode`` of each text."""

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Text of ids; ends of documents are left out.

        Raises:
            ValueError: an id lies outside [0, vocab_size).
        """


class ByteTokenizer:
    """One id per byte of UTF-8; 256 ends a document."""

    kind = "byte"
    path: str | None = None
    vocab_size = 257
    eod = 256
    fingerprint = hashlib.sha256(b"byte 257 256").hexdigest()
    opening: tuple[int, ...] = ()

    def encode(self, text: str) -> Ids:
        """Ids of a text, int32 [bytes of its UTF-8]."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """``encode`` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        data = bytes(ids_without_eod(tokens, self))
        return data.decode("utf-8", errors="replace")


def open_tokenizer(kind: str, path: str | None) -> Tokenizer:
    """Reads a tokenizer.

    Args:
        kind: one of ``KINDS``.
        path: its file; for ``huggingface`` also the folder that holds tokenizer.json.

    Raises:
        ConfigError: the file is missing, malformed or of another kind, it has no token that ends a
            document, or its library is not installed.
    """
    if kind not in KINDS:
        raise ConfigError(TYPE_FLAG, kind, "must be one of its choices", ", ".join(KINDS))
    if kind == "byte":
        if path is not None:
            works = "leave it out, or name the file's --tokenizer-type"
            raise ConfigError(MODEL_FLAG, path, "the byte tokenizer has no file", works)
        return ByteTokenizer()
    wanted = _WANTED[kind]
    if path is None:
        rule = f"needs the tokenizer's file in {MODEL_FLAG}"
        raise ConfigError(TYPE_FLAG, kind, rule, f"{MODEL_FLAG} FILE, {wanted}")
    file = _regular_file(path, kind, wanted)
    if kind == "huggingface":
        from cp_megatron.data.tokenize.tokenizer_huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer.read(file)
    if kind == "sentencepiece":
        from cp_megatron.data.tokenize.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer.read(file)
    from cp_megatron.data.tokenize.tokenizer_tiktoken import TiktokenTokenizer

    return TiktokenTokenizer.read(file)


def ids_without_eod(tokens: npt.ArrayLike, tokenizer: Tokenizer) -> list[int]:
    """The ids to decode, checked.

    Raises:
        ValueError: an id lies outside the vocabulary.
    """
    values = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if values.size and (values.min() < 0 or values.max() >= tokenizer.vocab_size):
        raise ValueError(f"tokens must lie in [0, {tokenizer.vocab_size})")
    kept: list[int] = values[values != tokenizer.eod].tolist()
    return kept


def missing_package(kind: str, package: str) -> ConfigError:
    """The refusal of a kind whose library is not installed."""
    rule = f"needs the package {package}, which is not installed"
    return ConfigError(TYPE_FLAG, kind, rule, "pip install 'cp_megatron[data]'")


def malformed(path: Path, kind: str, reason: object) -> ConfigError:
    """The refusal of a file that its library does not read."""
    told = " ".join(str(reason).split())
    rule = f"is no {kind} tokenizer: {told}"
    return ConfigError(MODEL_FLAG, str(path), rule, _WANTED[kind])


def no_end(path: Path, tried: str) -> ConfigError:
    """The refusal of a tokenizer without a token that ends documents."""
    rule = f"has no token that ends a document: {tried}"
    return ConfigError(MODEL_FLAG, str(path), rule, "a tokenizer that has one")


def fingerprint_of(kind: str, data: bytes, eod: int) -> str:
    """SHA-256 (hex) of a tokenizer's file, its kind and its end of document."""
    return hashlib.sha256(f"{kind} {eod} ".encode() + data).hexdigest()


def read_bytes(path: Path) -> bytes:
    """A tokenizer's whole file.

    Raises:
        ConfigError: it can not be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        rule = f"can not be read: {error.strerror}"
        raise ConfigError(MODEL_FLAG, str(path), rule, "a file that can be read") from None


def _regular_file(path: str, kind: str, wanted: str) -> Path:
    """The tokenizer's file; a folder stands for the tokenizer.json in it."""
    file = Path(path)
    try:
        if kind == "huggingface" and file.is_dir():
            file = file / "tokenizer.json"
        mode = os.stat(file).st_mode
    except (OSError, ValueError):
        raise ConfigError(MODEL_FLAG, str(file), "there is no such file", wanted) from None
    if not stat.S_ISREG(mode):
        raise ConfigError(MODEL_FLAG, str(file), "must be a regular file", wanted)
    return file
