"""The byte tokenizer as files that Hugging Face reads. No torch.

tokenizer.json can not spell a byte that is no printable character, so GPT-2's alphabet stands for
the 256 bytes (Radford et al. 2019): a printable byte is the character of that number, the others
are the characters from 256 on, in their order::

    byte    "A" 65    "\\n" 10    0xC3 195
    token   A         Ċ (266)     Ã

A BPE over these without a single merge leaves every byte a token, and a token's id is its byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cp_megatron.data.tokenize.tokenizer import ByteTokenizer

END = "<|endoftext|>"


def byte_tokenizer_files(seq_length: int) -> dict[str, dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json by name.

    Args:
        seq_length: tokens of the longest row the model is made for.
    """
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level |= {"use_regex": False}
    end: dict[str, Any] = {
        "id": ByteTokenizer.eod,
        "content": END,
        "special": True,
        "normalized": False,
    }
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    body: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": bpe_model(list(byte_alphabet()), merges=[]),
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        # A text that spells the end is bytes like any other, as in the byte tokenizer.
        "split_special_tokens": True,
    }
    return {"tokenizer.json": body, "tokenizer_config.json": config}


def bpe_model(
    tokens: Sequence[str], *, merges: Sequence[Any], ignore_merges: bool = False
) -> dict[str, Any]:
    """The model of a tokenizer.json: byte-level BPE, a token's id being its place.

    Args:
        tokens: the vocabulary.
        merges: pairs of tokens, the first to be merged first.
        ignore_merges: a word that is a token stays whole.
    """
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": list(merges),
    }


def byte_alphabet() -> str:
    """The character that stands for each byte, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))
