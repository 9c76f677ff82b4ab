"""SentencePiece models, read by the package ``sentencepiece``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cp_megatron.data.tokenize.tokenizer import (
    Ids,
    LibraryTokenizer,
    ids_without_eod,
    malformed,
    missing_package,
    no_end,
    read_bytes,
)


@dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer(LibraryTokenizer):
    """The tokenizer of a SentencePiece ``.model``.

    Most models normalise spaces and Unicode, so that ``decode`` gives back the normalised text.
    """

    kind: ClassVar[str] = "sentencepiece"

    @classmethod
    def read(cls, path: Path) -> SentencePieceTokenizer:
        """Reads a model; its end of sentence ends a document.

        Raises:
            ConfigError: the package or the end is missing, or the file is malformed.
        """
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise missing_package(cls.kind, "sentencepiece") from None
        data = read_bytes(path)
        library = SentencePieceProcessor()
        try:
            library.LoadFromSerializedProto(data)
            size, eod = int(library.vocab_size()), int(library.eos_id())
        except Exception as error:  # the binding raises RuntimeError and others
            raise malformed(path, cls.kind, error) from None
        if size <= 0:
            raise malformed(path, cls.kind, "it has no pieces")
        if not 0 <= eod < size:
            raise no_end(path, "the model was trained without an end of sentence (eos_id -1)")
        return cls.make(path, data, library, vocab_size=size, eod=eod)

    def encode(self, text: str) -> Ids:
        return np.array(self.backend.encode(text, out_type=int), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Calls ``encode`` for each text, in the library's own threads."""
        batch = self.backend.encode(list(texts), out_type=int, num_threads=-1)
        return [np.array(ids, dtype=np.int32) for ids in batch]

    def decode(self, tokens: npt.ArrayLike) -> str:
        kept = ids_without_eod(tokens, self)
        return str(self.backend.decode(kept)) if kept else ""
