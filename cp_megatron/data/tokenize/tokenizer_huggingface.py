"""Tokenizers in the JSON format of Hugging Face, read by the package ``tokenizers``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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

_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer(LibraryTokenizer):
    """The tokenizer of a ``tokenizer.json``."""

    kind: ClassVar[str] = "huggingface"

    @classmethod
    def read(cls, path: Path) -> HuggingFaceTokenizer:
        """Reads a ``tokenizer.json`` and, for the end of a document, the files beside it.

        The end of a document is ``eos_token`` of tokenizer_config.json, else ``eos_token_id`` of
        config.json, else the first of <|endoftext|>, </s>, <|end_of_text|> in the vocabulary.

        Raises:
            ConfigError: the package or the end is missing, or the file is malformed.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise missing_package("huggingface", "tokenizers") from None
        data = read_bytes(path)
        try:
            library = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises plain Exception
            raise malformed(path, "huggingface", error) from None
        # A file may set both from its training; a document must come out whole and unpadded.
        library.no_truncation()
        library.no_padding()
        largest = max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        eod = next((e for e in _ends(path, library) if e is not None and 0 <= e <= largest), None)
        if eod is None:
            tried = "no eos_token in tokenizer_config.json, no eos_token_id in config.json, no "
            raise no_end(path, f"{tried}({', '.join(_ENDS)})")
        opening = _opening(library)
        return cls.make(path, data, library, vocab_size=largest + 1, eod=eod, opening=opening)

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]  # faster than the library's encode: no offsets

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Calls ``encode`` for each text, in the library's own threads."""
        batch = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in batch]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Returns the range of characters that each id of ``encode(text)`` stands for."""
        return list(self.library.encode(text, add_special_tokens=False).offsets)

    def decode(self, tokens: npt.ArrayLike) -> str:
        ids = ids_without_eod(tokens, self)
        return str(self.library.decode(ids, skip_special_tokens=False))


def _opening(library: Any) -> tuple[int, ...]:
    """The ids that the post-processor puts before a text."""
    bare = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a", add_special_tokens=True).ids
    places = range(len(whole) - len(bare) + 1)
    return tuple(next((whole[:n] for n in places if whole[n : n + len(bare)] == bare), ()))


def _ends(path: Path, library: Any) -> Iterator[int | None]:
    """The ids that may end a document, the most reliable source first."""
    token = _entry(path.parent / "tokenizer_config.json", "eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    yield library.token_to_id(token) if isinstance(token, str) else None
    number = _entry(path.parent / "config.json", "eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    yield number if type(number) is int else None
    for text in _ENDS:
        yield library.token_to_id(text)


def _entry(path: Path, key: str) -> Any:
    """An entry of a JSON file; None if the file or the entry is missing."""
    try:
        value = json.loads(path.read_bytes())
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise malformed(path, "huggingface", error) from None
    return value.get(key) if isinstance(value, dict) else None
