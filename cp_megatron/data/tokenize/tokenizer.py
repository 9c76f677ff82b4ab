"""The interface of tokenizers, the byte tokenizer, and the code that all tokenizers share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError

TYPE_FLAG = "--tokenizer-type"
MODEL_FLAG = "--tokenizer-model"
VOCAB_FLAG = "--vocab-file"
MERGE_FLAG = "--merge-file"
FILES: Mapping[str, str] = MappingProxyType(
    {
        "huggingface": "a tokenizer.json, or the folder of a Hugging Face model",
        "sentencepiece": "the .model file of a SentencePiece tokenizer",
        "tiktoken": 'a tiktoken file, whose lines are "base64 rank"',
        "gpt2": "a vocab.json, and a merges.txt of the same tokenizer",
    }
)
"""Kind of tokenizer -> the file that it is read from."""

Ids = npt.NDArray[np.int32]


class Tokenizer(Protocol):
    """Turns text into ids and back.

    All but ``byte`` and ``sentencepiece`` turn a special token that a text spells out, such as
    ``<|im_start|>``, into its id, as transformers does. No tokenizer adds ids to a text.

    Attributes:
        kind: ``byte``, or a key of ``FILES``.
        path: the file that it was read from (of ``gpt2`` the vocabulary); None if there is none.
        vocab_size: ids lie in [0, vocab_size).
        eod: the id that ends every document.
        fingerprint: SHA-256 (hex) of what decides the ids.
        opening: ids that a prompt begins with (Llama's BOS). Rows of data do not have them.
        notes: what the user should know about it, for the start table.
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
    def opening(self) -> tuple[int, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def encode(self, text: str) -> Ids:
        """Returns the ids of a text, int32 [n], without an end of document."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Calls ``encode`` for each text."""

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Returns the text of ids, without the ends of documents.

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
    notes: tuple[str, ...] = ()

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Returns the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids_without_eod(tokens, self)).decode("utf-8", errors="replace")


@dataclass(frozen=True, kw_only=True)
class LibraryTokenizer:
    """The attributes of a tokenizer that a library reads from a file; see ``Tokenizer``."""

    kind: ClassVar[str]
    path: str
    vocab_size: int
    eod: int
    fingerprint: str
    opening: tuple[int, ...]
    notes: tuple[str, ...] = ()
    backend: Any

    @classmethod
    def make(
        cls,
        path: Path,
        data: bytes,
        library: Any,
        *,
        vocab_size: int,
        eod: int,
        opening: tuple[int, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> Self:
        """Makes the tokenizer that ``library`` read from ``data``, the contents of ``path``."""
        return cls(
            path=str(path),
            vocab_size=vocab_size,
            eod=eod,
            fingerprint=hashlib.sha256(f"{cls.kind} {eod} ".encode() + data).hexdigest(),
            opening=opening,
            notes=notes,
            backend=library,
        )


def ids_without_eod(tokens: npt.ArrayLike, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids to decode.

    Raises:
        ValueError: an id lies outside the vocabulary.
    """
    values = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if values.size and (values.min() < 0 or values.max() >= tokenizer.vocab_size):
        raise ValueError(f"tokens must lie in [0, {tokenizer.vocab_size})")
    kept: list[int] = values[values != tokenizer.eod].tolist()
    return kept


def words_for(tokenizer: Tokenizer) -> tuple[str, str]:
    """The flag that chose a tokenizer, and its value."""
    if tokenizer.path is None:
        return TYPE_FLAG, tokenizer.kind
    return VOCAB_FLAG if tokenizer.kind == "gpt2" else MODEL_FLAG, tokenizer.path


def missing_package(kind: str, package: str) -> ConfigError:
    """The error for a kind of tokenizer whose library is not installed."""
    rule = f"needs the package {package}, which is not installed"
    return ConfigError(TYPE_FLAG, kind, rule, "pip install 'cp_megatron[data]'")


def malformed(path: Path, kind: str, reason: object) -> ConfigError:
    """The error for a file that the library cannot read."""
    rule = f"is not a {kind} tokenizer: {' '.join(str(reason).split())}"
    flag = VOCAB_FLAG if kind == "gpt2" else MODEL_FLAG
    return ConfigError(flag, str(path), rule, FILES[kind])


def no_end(path: Path, tried: str, flag: str = MODEL_FLAG) -> ConfigError:
    """The error for a tokenizer without a token that ends documents."""
    rule = f"has no token that ends a document: {tried}"
    return ConfigError(flag, str(path), rule, "a tokenizer that has one")


def read_bytes(path: Path, flag: str = MODEL_FLAG) -> bytes:
    """Reads the whole file of a tokenizer.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
        raise ConfigError(flag, str(path), rule, "a readable file") from None
