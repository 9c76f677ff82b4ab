"""A range of a corpus, as rows are cut from it: tokens are read, checked and never copied whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive tokens of a corpus.

    Attributes:
        tokens: integers [n], a view of the corpus (often of a mapped file).
        document_starts: int64 [d], increasing: where documents begin in ``tokens``. What lies
            before the first is the rest of a document that began earlier.
        eod: the token that ends documents, where one does, and that pads.
        vocab_size: every token must lie in [0, vocab_size).
        offset: where the part begins in the corpus, for messages.
        name: of the corpus, for messages.
        loss: bool [n], whether a token is to be predicted; None where every token is.
    """

    tokens: npt.NDArray[np.integer]
    document_starts: npt.NDArray[np.int64]
    eod: int
    vocab_size: int
    offset: int = 0
    name: str = ""
    loss: npt.NDArray[np.bool_] | None = None

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens [start, stop), copied.

        Raises:
            ConfigError: one of them is no id of the vocabulary.
        """
        found = self.tokens[start:stop].astype(np.int64)
        if found.size and (found.min() < 0 or found.max() >= self.vocab_size):
            bad = int(np.flatnonzero((found < 0) | (found >= self.vocab_size))[0])
            rule = f"token {self.offset + start + bad:,} is id {found[bad]}"
            rule += f", which the tokenizer's vocabulary of {self.vocab_size:,} does not have"
            raise ConfigError("--data-path", self.name, rule, "the tokenizer it was made with")
        return found

    def starts_within(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The document starts in [start, stop)."""
        low, high = np.searchsorted(self.document_starts, [start, stop])
        return self.document_starts[low:high]
