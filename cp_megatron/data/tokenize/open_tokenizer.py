"""Opens a tokenizer by its type.

    --tokenizer-type    reads                                            needs
    byte                nothing: one id per byte of UTF-8, 256 ends      nothing
    huggingface         tokenizer.json, or the folder that holds it      tokenizers
    sentencepiece       a .model file                                    sentencepiece
    tiktoken            lines "base64 rank"                              tiktoken
    gpt2                --vocab-file (JSON) and --merge-file             tokenizers

Each library is imported by one module beside this one, and only when its type is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from cp_megatron.data.tokenize.tokenizer import (
    FILES,
    MERGE_FLAG,
    MODEL_FLAG,
    TYPE_FLAG,
    VOCAB_FLAG,
    ByteTokenizer,
    Tokenizer,
)
from cp_megatron.data.tokenize.tokenizer_huggingface import GPT2Tokenizer, HuggingFaceTokenizer
from cp_megatron.data.tokenize.tokenizer_sentencepiece import SentencePieceTokenizer
from cp_megatron.data.tokenize.tokenizer_tiktoken import TiktokenTokenizer
from cp_megatron.errors import ConfigError

_OLDER = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model", "vocab.txt")
"""Files of tokenizers from which transformers makes a tokenizer.json."""


class TokenizerFiles(Protocol):
    """The settings that choose a tokenizer, of a run or of ``prepare_data.py``."""

    @property
    def tokenizer_type(self) -> str: ...
    @property
    def tokenizer_model(self) -> str | None: ...
    @property
    def vocab_file(self) -> str | None: ...
    @property
    def merge_file(self) -> str | None: ...


def tokenizer_of(chosen: TokenizerFiles) -> Tokenizer:
    """Reads the tokenizer that settings choose; see ``open_tokenizer``."""
    return open_tokenizer(
        chosen.tokenizer_type,
        chosen.tokenizer_model,
        vocab_file=chosen.vocab_file,
        merge_file=chosen.merge_file,
    )


def open_tokenizer(
    kind: str, path: str | None, *, vocab_file: str | None = None, merge_file: str | None = None
) -> Tokenizer:
    """Reads a tokenizer.

    Args:
        kind: ``byte``, or a key of ``FILES``.
        path: its file; for ``huggingface`` also the folder that holds tokenizer.json.
        vocab_file, merge_file: the two files of ``gpt2``, which has no other.

    Raises:
        ConfigError: a file is missing, malformed or of another kind, it has no token that ends a
            document, or its library is not installed.
    """
    if kind != "byte" and kind not in FILES:
        works = f"byte, {', '.join(FILES)}"
        raise ConfigError(TYPE_FLAG, kind, "must be one of its choices", works)
    given = {MODEL_FLAG: path, VOCAB_FLAG: vocab_file, MERGE_FLAG: merge_file}
    read = () if kind == "byte" else (VOCAB_FLAG, MERGE_FLAG) if kind == "gpt2" else (MODEL_FLAG,)
    for flag, value in given.items():
        if value is not None and flag not in read:
            raise _unread(kind, flag, value)
    files = [_file(kind, flag, given[flag]) for flag in read]
    if kind == "huggingface":
        return HuggingFaceTokenizer.read(*files)
    if kind == "sentencepiece":
        return SentencePieceTokenizer.read(*files)
    if kind == "tiktoken":
        return TiktokenTokenizer.read(*files)
    return GPT2Tokenizer.read(*files) if kind == "gpt2" else ByteTokenizer()


def _unread(kind: str, flag: str, value: str) -> ConfigError:
    """The error for a file that a kind of tokenizer does not read."""
    rule = f"the {kind} tokenizer has no {'file' if kind == 'byte' else 'such file'}"
    others = "the type of the file" if flag == MODEL_FLAG else "gpt2 (Megatron's GPT2BPETokenizer)"
    return ConfigError(flag, value, rule, f"leave it out, or {TYPE_FLAG} {others}")


def _file(kind: str, flag: str, value: str | None) -> Path:
    """The regular file that a flag gives, or that lies in the folder of a Hugging Face model."""
    if value is None:
        rule, works = f"needs the tokenizer's file in {flag}", f"{flag} FILE, {FILES[kind]}"
        if kind == "gpt2":
            works = f"{VOCAB_FLAG} vocab.json {MERGE_FLAG} merges.txt"
        raise ConfigError(TYPE_FLAG, kind, rule, works)
    file = Path(value)
    if kind == "huggingface" and os.path.isdir(value):
        file /= "tokenizer.json"
        if not file.exists() and any((file.parent / name).is_file() for name in _OLDER):
            raise _older(value)
    if not os.path.isfile(file):
        rule = "must be a regular file" if os.path.exists(file) else "there is no such file"
        raise ConfigError(flag, str(file), rule, FILES[kind])
    return file


def _older(folder: str) -> ConfigError:
    """The error for a folder whose tokenizer is in files that only transformers puts together."""
    rule = "has no tokenizer.json, but files from which transformers makes one"
    load = f"from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained({folder!r})"
    works = f'python -c "{load}; t.save_pretrained({folder!r})"'
    return ConfigError(MODEL_FLAG, folder, rule, works)
