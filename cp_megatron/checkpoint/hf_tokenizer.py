"""Writes the byte tokenizer as files that Hugging Face reads. This module does not import torch.

tokenizer.json cannot contain a byte that is not a printable character. So the 256 bytes are written
in the alphabet of GPT-2 (Radford et al. 2019): a printable byte is the character of that number,
and the other bytes are the characters from 256 on, in their order::

    byte    "A" 65    "\\n" 10    0xC3 195
    token   A         Ċ (266)     Ã

A BPE over this alphabet without merges makes every byte a token, whose id is the byte.
"""

from __future__ import annotations

from typing import Any

from cp_megatron.data.tokenize.tokenizer import ByteTokenizer

_END = "<|endoftext|>"


def byte_tokenizer_files(seq_length: int) -> dict[str, dict[str, Any]]:
    """Makes the contents of tokenizer.json and tokenizer_config.json.

    Args:
        seq_length: length of the longest row that the model is made for, in tokens.

    Returns:
        the JSON object of each file, by name.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level |= {"use_regex": False}
    end = {"id": ByteTokenizer.eod, "content": _END, "special": True, "normalized": False}
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
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix")),
            "end_of_word_suffix": None,
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {token: byte for byte, token in enumerate(_byte_alphabet())},
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "eos_token": _END,
        "clean_up_tokenization_spaces": False,
        # As in the byte tokenizer, a text that contains the name of the end token is only bytes.
        "split_special_tokens": True,
    }
    return {"tokenizer.json": body, "tokenizer_config.json": config}


def _byte_alphabet() -> str:
    """Returns the characters that stand for the bytes, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))
