"""A corpus of tokens and its documents, and a range of it that rows are cut from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CorpusRange:
    """Consecutive tokens of a corpus. Tokens are checked when they are read, never copied whole.

    Attributes:
        tokens: integers [n], a view of the corpus (often of a memory-mapped file).
        document_starts: int64 [d], increasing: where documents begin in ``tokens``. The tokens
            before the first belong to a document that began before the range.
        name: the name of the corpus, for messages.
        eod: the token that ends documents and that pads. Documents may lack it.
        vocab_size: every token must lie in [0, vocab_size).
        offset: where the range begins in the corpus, for messages.
        loss: bool [n], whether a token is to be predicted; None if every token is.
    """

    tokens: npt.NDArray[np.integer]
    document_starts: npt.NDArray[np.int64]
    name: str = ""
    eod: int
    vocab_size: int
    offset: int = 0
    loss: npt.NDArray[np.bool_] | None = None

    def range(self, start: int, stop: int) -> CorpusRange:
        """The tokens [start, stop), as a view."""
        return CorpusRange(
            tokens=self.tokens[start:stop],
            document_starts=self.starts_within(start, stop) - start,
            name=self.name,
            eod=self.eod,
            vocab_size=self.vocab_size,
            offset=self.offset + start,
            loss=None if self.loss is None else self.loss[start:stop],
        )

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Copies the tokens [start, stop).

        Raises:
            ConfigError: one of them is not an id of the vocabulary.
        """
        copied = self.tokens[start:stop].astype(np.int64)
        if copied.size and (copied.min() < 0 or copied.max() >= self.vocab_size):
            bad = int(np.flatnonzero((copied < 0) | (copied >= self.vocab_size))[0])
            rule = f"token {self.offset + start + bad:,} is id {copied[bad]}"
            rule += f", which the tokenizer's vocabulary of {self.vocab_size:,} does not have"
            raise ConfigError("--data-path", self.name, rule, "the tokenizer it was made with")
        return copied

    def starts_within(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The document starts in [start, stop)."""
        low, high = np.searchsorted(self.document_starts, [start, stop])
        return self.document_starts[low:high]


@dataclass(frozen=True, kw_only=True)
class Corpus(CorpusRange):
    """All documents of a dataset, one after the other.

    Attributes:
        fingerprint: SHA-256 (hex) of what decides the tokens.
        skipped: files or lines that were left out because they are not text.
    """

    fingerprint: str
    skipped: int = 0
