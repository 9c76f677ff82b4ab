"""SentencePiece models, read by the package ``sentencepiece``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cp_megatron.data.tokenize.tokenizer import (
    Ids,
    fingerprint_of,
    ids_without_eod,
    malformed,
    missing_package,
    no_end,
    read_bytes,
)


@dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer:
    """A SentencePiece ``.model``; see ``Tokenizer``. ``read`` makes one.

    Most models normalise spaces and Unicode, so that ``decode`` gives back the normalised text.
    """

    kind: str = field(default="sentencepiece", init=False)
    path: str
    vocab_size: int
    eod: int
    fingerprint: str
    opening: tuple[int, ...] = field(default=(), init=False)
    _library: Any

    @classmethod
    def read(cls, path: Path) -> SentencePieceTokenizer:
        """Reads a model; its end of sentence ends a document.

        Raises:
            ConfigError: the package or the end is missing, or the file is malformed.
        """
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise missing_package("sentencepiece", "sentencepiece") from None
        data = read_bytes(path)
        library = SentencePieceProcessor()
        try:
            library.LoadFromSerializedProto(data)
            size, eod = int(library.vocab_size()), int(library.eos_id())
        except Exception as error:  # RuntimeError or what the binding makes of it
            raise malformed(path, "sentencepiece", error) from None
        if size <= 0:
            raise malformed(path, "sentencepiece", "it has no pieces")
        if not 0 <= eod < size:
            raise no_end(path, "the model was trained without an end of sentence (eos_id -1)")
        return cls(
            path=str(path),
            vocab_size=size,
            eod=eod,
            fingerprint=fingerprint_of("sentencepiece", data, eod),
            _library=library,
        )

    def encode(self, text: str) -> Ids:
        """Ids of a text, int32 [n]."""
        return np.array(self._library.encode(text, out_type=int), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """``encode`` of each text, by the library's own threads."""
        found = self._library.encode(list(texts), out_type=int, num_threads=-1)
        return [np.array(ids, dtype=np.int32) for ids in found]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Text of ids; ends of documents are left out."""
        kept = ids_without_eod(tokens, self)
        text: str = self._library.decode(kept) if kept else ""
        return text
