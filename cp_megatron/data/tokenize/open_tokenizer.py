"""Opens a tokenizer by its type.

    --tokenizer-type    reads                                            needs
    byte                nothing: one id per byte of UTF-8, 256 ends      nothing
    huggingface         tokenizer.json, or the folder that holds it      tokenizers
    sentencepiece       a .model file                                    sentencepiece
    tiktoken            lines "base64 rank"                              tiktoken

Each library is imported by one module beside this one, and only when its type is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

from cp_megatron.data.tokenize.tokenizer import (
    FILES,
    MODEL_FLAG,
    TYPE_FLAG,
    ByteTokenizer,
    Tokenizer,
)
from cp_megatron.data.tokenize.tokenizer_huggingface import HuggingFaceTokenizer
from cp_megatron.data.tokenize.tokenizer_sentencepiece import SentencePieceTokenizer
from cp_megatron.data.tokenize.tokenizer_tiktoken import TiktokenTokenizer
from cp_megatron.errors import ConfigError

_OLDER = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model", "vocab.txt")
"""Files of tokenizers from which transformers makes a tokenizer.json."""


def open_tokenizer(kind: str, path: str | None) -> Tokenizer:
    """Reads a tokenizer.

    Args:
        kind: ``byte``, ``huggingface``, ``sentencepiece`` or ``tiktoken``.
        path: its file; for ``huggingface`` also the folder that holds tokenizer.json.

    Raises:
        ConfigError: the file is missing, malformed or of another kind, it has no token that ends a
            document, or its library is not installed.
    """
    if kind == "byte":
        if path is not None:
            works = "leave it out, or name the file's --tokenizer-type"
            raise ConfigError(MODEL_FLAG, path, "the byte tokenizer has no file", works)
        return ByteTokenizer()
    if kind not in FILES:
        works = f"byte, {', '.join(FILES)}"
        raise ConfigError(TYPE_FLAG, kind, "must be one of its choices", works)
    if path is None:
        rule = f"needs the tokenizer's file in {MODEL_FLAG}"
        raise ConfigError(TYPE_FLAG, kind, rule, f"{MODEL_FLAG} FILE, {FILES[kind]}")
    file = Path(path)
    if kind == "huggingface" and os.path.isdir(path):
        file = file / "tokenizer.json"
        if not file.exists() and any((Path(path) / name).is_file() for name in _OLDER):
            raise _older(path)
    if not os.path.isfile(file):
        rule = "must be a regular file" if os.path.exists(file) else "there is no such file"
        raise ConfigError(MODEL_FLAG, str(file), rule, FILES[kind])
    if kind == "huggingface":
        return HuggingFaceTokenizer.read(file)
    if kind == "sentencepiece":
        return SentencePieceTokenizer.read(file)
    return TiktokenTokenizer.read(file)


def _older(folder: str) -> ConfigError:
    """The error for a folder whose tokenizer is in files that only transformers puts together."""
    rule = "has no tokenizer.json, but files from which transformers makes one"
    load = f"from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained({folder!r})"
    works = f'python -c "{load}; t.save_pretrained({folder!r})"'
    return ConfigError(MODEL_FLAG, folder, rule, works)
