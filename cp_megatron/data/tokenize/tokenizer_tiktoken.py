"""tiktoken files (lines of a token in base64 and its rank), read by the package ``tiktoken``.

Such a file holds neither the pattern that cuts a text into words nor the special tokens. Both
follow from the number of ranks, as the models that these files belong to define them. Files with
another number of ranks use cl100k and have <|endoftext|> after the largest rank.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cp_megatron.data.tokenize.tokenizer import (
    Ids,
    LibraryTokenizer,
    ids_without_eod,
    malformed,
    missing_package,
    read_bytes,
)

_SHORT = "'s|'t|'re|'ve|'m|'ll|'d"
_CL100K = (
    rf"(?i:{_SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _CL100K.replace("{1,3}", "")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:{_SHORT})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:{_SHORT})?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_QWEN_SPECIAL = (_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
_LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
)


_KNOWN: Mapping[int, tuple[str, int, tuple[str, ...], str]] = MappingProxyType(
    {  # ranks: pattern, special tokens from an id on, the one that ends a document
        151_643: (_QWEN, 151_643, _QWEN_SPECIAL, _END),
        128_000: (_CL100K, 128_000, _LLAMA3_SPECIAL, "<|end_of_text|>"),
        199_998: (_O200K, 199_999, (_END,), _END),
        100_256: (_CL100K, 100_257, (_END,), _END),
    }
)


@dataclass(frozen=True, kw_only=True)
class TiktokenTokenizer(LibraryTokenizer):
    """The tokenizer of a tiktoken file."""

    kind: ClassVar[str] = "tiktoken"

    @classmethod
    def read(cls, path: Path) -> TiktokenTokenizer:
        """Reads a file; ``_KNOWN`` gives what the file does not say.

        Raises:
            ConfigError: the package is missing, or the file is malformed.
        """
        try:
            import tiktoken
        except ImportError:
            raise missing_package(cls.kind, "tiktoken") from None
        data = read_bytes(path)
        ranks = _read_ranks(path, data)
        other = (_CL100K, max(ranks.values()) + 1, (_END,), _END)
        pattern, first, texts, end = _KNOWN.get(len(ranks), other)
        special = {text: first + n for n, text in enumerate(texts)}
        library = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=special
        )
        size = library.max_token_value + 1
        return cls.make(path, data, library, vocab_size=size, eod=special[end])

    def encode(self, text: str) -> Ids:
        return np.array(self.backend.encode(text, allowed_special="all"), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Calls ``encode`` for each text, in the library's own threads."""
        batch = self.backend.encode_batch(list(texts), allowed_special="all")
        return [np.array(ids, dtype=np.int32) for ids in batch]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Returns the text of ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id lies outside the vocabulary, or has no token.
        """
        kept = ids_without_eod(tokens, self)
        try:
            return str(self.backend.decode(kept, errors="replace"))
        except KeyError as error:
            raise ValueError(f"token {error} is in a hole of the vocabulary") from None


def _read_ranks(path: Path, data: bytes) -> Mapping[bytes, int]:
    """Token -> rank. Every byte must be a token, so that every text can be encoded."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii.Error, too
            raise malformed(path, "tiktoken", f'line {number} is not "base64 rank"') from None
    if len(set(ranks.values())) != len(ranks) or any(rank < 0 for rank in ranks.values()):
        raise malformed(path, "tiktoken", "two tokens have one rank, or a rank is negative")
    if any(bytes([value]) not in ranks for value in range(256)):
        raise malformed(path, "tiktoken", "not every byte is a token")
    return ranks
