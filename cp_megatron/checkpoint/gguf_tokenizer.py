"""The tokenizer in a GGUF file's metadata as the files of a Hugging Face folder. No torch.

Byte-level BPE only, as GPT-2, SmolLM, Qwen2 and Llama 3 have it. The metadata holds the vocabulary
and the merges; how text is cut before them is a name (``tokenizer.ggml.pre``) that stands for a
rule written in llama.cpp's source, spelt out in ``_PRE_TOKENIZERS`` in the words of ``tokenizers``:

    "In 2024"  -> digits one by one "In " "2" "0" "2" "4" -> GPT-2's pattern "In" " " "2" "0" ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_megatron.checkpoint.gguf import FLAG, GGUFFile
from cp_megatron.checkpoint.hf_tokenizer import bpe_model
from cp_megatron.errors import ConfigError

_CONTROL, _USER_DEFINED = 3, 4
"""Kinds of tokens: special ones, and those that are words of a user's own."""

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return [split, _byte_level(use_regex=False)]


_GPT2: tuple[dict[str, Any], ...] = (_byte_level(use_regex=True),)
_PRE_TOKENIZERS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": ({"type": "Digits", "individual_digits": True}, *_GPT2),
    "qwen2": tuple(_split(_QWEN2_PATTERN)),
    "llama-bpe": tuple(_split(_LLAMA3_PATTERN)),
}


def tokenizer_files(file: GGUFFile, *, vocab_size: int) -> dict[str, Any]:
    """The contents of tokenizer.json, tokenizer_config.json and special_tokens_map.json by name.

    Args:
        file: an open GGUF file.
        vocab_size: rows of the embedding; the tokenizer may have fewer tokens.

    Raises:
        ConfigError: the metadata holds no tokenizer, a kind that is not honoured, or contradicts
            itself.
    """
    reader = _Reader(file)
    tokens = reader.tokens(vocab_size)
    special = reader.special(tokens)
    body = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(reader.kinds(tokens), tokens),
        "normalizer": {"type": "NFC"} if reader.pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(reader.pre_tokenizer())},
        "post_processor": _post_processor(reader, special),
        "decoder": _byte_level(use_regex=True),
        "model": bpe_model(
            tokens, merges=reader.merges(tokens), ignore_merges=reader.pre == "llama-bpe"
        ),
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.metadata.get(f"{reader.architecture}.context_length"),
        "clean_up_tokenization_spaces": False,
        **special,
    }
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return {
        "tokenizer.json": body,
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
    }


class _Reader:
    """Metadata of the tokenizer, checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = file.metadata.get("general.architecture")
        self.pre = str(self.get("pre", "default"))
        kind = self.get("model", "none")
        if kind != "gpt2":
            rule = f"its tokenizer is of the kind {kind}, only byte-level BPE (gpt2) is converted"
            raise self.refused(rule, "the model's own Hugging Face folder")

    def get(self, name: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{name}", default)

    def refused(self, rule: str, works: str = "") -> ConfigError:
        return ConfigError(FLAG, self.file.path, rule, works)

    def pre_tokenizer(self) -> tuple[dict[str, Any], ...]:
        if self.pre not in _PRE_TOKENIZERS:
            rule = f"its tokenizer cuts text by the rule {self.pre}, which is not known here"
            raise self.refused(rule, ", ".join(_PRE_TOKENIZERS))
        return _PRE_TOKENIZERS[self.pre]

    def tokens(self, vocab_size: int) -> list[str]:
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
            raise self.refused("has no list of tokens")
        if not 0 < len(tokens) <= vocab_size:
            raise self.refused(f"has {len(tokens)} tokens and {vocab_size} rows of the embedding")
        if len(set(tokens)) != len(tokens):
            raise self.refused("is damaged: a token is there twice")
        return tokens

    def kinds(self, tokens: list[str]) -> list[int]:
        kinds = self.get("token_type", [1] * len(tokens))
        if not isinstance(kinds, list) or len(kinds) != len(tokens):
            raise self.refused("is damaged: it does not say of every token what it is")
        return kinds

    def merges(self, tokens: list[str]) -> list[list[str]]:
        """Pairs of tokens; their joints are tokens too, or ``tokenizers`` would refuse the file."""
        merges, known = self.get("merges"), set(tokens)
        if not isinstance(merges, list):
            raise self.refused("has no list of merges")
        pairs = []
        for merge in merges:
            # Byte-level BPE writes a space as another letter, so the one here is between the two.
            pair = merge.split(" ") if isinstance(merge, str) else []
            if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
                raise self.refused(f"is damaged: the merge {merge!r} is not of its tokens")
            pairs.append(pair)
        return pairs

    def special(self, tokens: list[str]) -> dict[str, str]:
        """``bos_token`` and so on, those that the file names."""
        found = {}
        for name, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
            number = self.get(f"{name}_token_id")
            if number is None:
                continue
            if not isinstance(number, int) or not 0 <= number < len(tokens):
                raise self.refused(f"is damaged: its {name} token is {number}")
            found[f"{ours}_token"] = tokens[number]
        return found


def _added(kinds: list[int], tokens: list[str]) -> list[dict[str, Any]]:
    """The tokens that are found in the text before it is cut."""
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _post_processor(reader: _Reader, special: Mapping[str, str]) -> dict[str, Any]:
    """A begin token where the model wants one, else nothing that changes ids."""
    if not reader.get("add_bos_token", False) or "bos_token" not in special:
        return _byte_level(use_regex=True)
    bos = special["bos_token"]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            bos: {"id": bos, "ids": [reader.get("bos_token_id")], "tokens": [bos]},
        },
    }
