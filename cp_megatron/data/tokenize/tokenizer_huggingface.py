"""Tokenizers in the JSON format of Hugging Face, read by the package ``tokenizers``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
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

_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer:
    """A ``tokenizer.json``; see ``Tokenizer``. ``read`` makes one."""

    kind: str = field(default="huggingface", init=False)
    path: str
    vocab_size: int
    eod: int
    fingerprint: str
    opening: tuple[int, ...]
    _library: Any

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
        # Left in the file by whoever trained it; a document must come out whole and unpadded.
        library.no_truncation()
        library.no_padding()
        largest = max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        eod = next((e for e in _ends(path, library) if e is not None and 0 <= e <= largest), None)
        if eod is None:
            tried = (
                f"no eos_token in tokenizer_config.json, no eos_token_id in config.json, no {_ENDS}"
            )
            raise no_end(path, tried.replace("'", ""))
        return cls(
            path=str(path),
            vocab_size=largest + 1,
            eod=eod,
            fingerprint=fingerprint_of("huggingface", data, eod),
            opening=_opening(library),
            _library=library,
        )

    def encode(self, text: str) -> Ids:
        """Ids of a text, int32 [n]."""
        return self.encode_batch([text])[0]  # the library is faster so: no offsets are counted

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """``encode`` of each text, by the library's own threads."""
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Text of ids; ends of documents are left out."""
        kept = ids_without_eod(tokens, self)
        text: str = self._library.decode(kept, skip_special_tokens=False)
        return text


def train_byte_level(
    texts: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    special: Sequence[str] = ("<|endoftext|>",),
) -> Any:
    """Trains a byte-level BPE (GPT-2's kind, every text comes back) and writes ``tokenizer.json``.

    Args:
        texts: what to train on.
        path: the file to write.
        vocab_size: at least 256 and the special tokens.
        special: special tokens, ids 0, 1, ..

    Returns:
        The library's own tokenizer.

    Raises:
        ConfigError: the package is missing.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise missing_package("huggingface", "tokenizers") from None
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.save(str(path))
    return library


def _opening(library: Any) -> tuple[int, ...]:
    """What its post-processor puts before a text."""
    bare = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a", add_special_tokens=True).ids
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return tuple(whole[:place])
    return ()


def _ends(path: Path, library: Any) -> Iterator[int | None]:
    """The ids that may end a document, the best first."""
    token = _entry(path.parent / "tokenizer_config.json", "eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    yield library.token_to_id(token) if isinstance(token, str) else None
    number = _entry(path.parent / "config.json", "eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    yield number if type(number) is int else None
    for text in _ENDS:
        yield library.token_to_id(text)


def _entry(path: Path, key: str) -> Any:
    """An entry of a JSON file that may be missing."""
    try:
        value = json.loads(path.read_bytes())
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise malformed(path, "huggingface", error) from None
    return value.get(key) if isinstance(value, dict) else None
