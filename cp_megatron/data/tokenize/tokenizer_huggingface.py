"""Tokenizers in the JSON format of Hugging Face, read by the package ``tokenizers``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cp_megatron.data.tokenize.tokenizer import (
    MERGE_FLAG,
    VOCAB_FLAG,
    Ids,
    LibraryTokenizer,
    ids_without_eod,
    malformed,
    missing_package,
    no_end,
    read_bytes,
)

_CONFIG = "tokenizer_config.json"
_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MISTRALS = frozenset({"mistral", "mistral3", "voxtral", "ministral", "pixtral"})
# The rule by which transformers mends tokenizers of Mistral that were saved before version 5.
_MISTRAL_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LARGE_VOCABULARY = 100_000
"""transformers mends only tokenizers with more entries than this."""


@dataclass(frozen=True, kw_only=True)
class _Encoding(LibraryTokenizer):
    """Encodes and decodes by the package ``tokenizers``."""

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]  # faster than the library's encode: no offsets

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Calls ``encode`` for each text, in the library's own threads."""
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in batch]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Returns the range of characters that each id of ``encode(text)`` stands for."""
        return list(self.backend.encode(text, add_special_tokens=False).offsets)

    def decode(self, tokens: npt.ArrayLike) -> str:
        ids = ids_without_eod(tokens, self)
        return str(self.backend.decode(ids, skip_special_tokens=False))


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer(_Encoding):
    """The tokenizer of a ``tokenizer.json``, completed by the files beside it."""

    kind: ClassVar[str] = "huggingface"

    @classmethod
    def read(cls, path: Path) -> HuggingFaceTokenizer:
        """Reads a ``tokenizer.json`` and what the files beside it add, as transformers does.

        Tokens that only tokenizer_config.json, special_tokens_map.json or added_tokens.json names
        become ids. The end of a document is ``eos_token`` of these files, else ``eos_token_id`` of
        config.json, else the first of <|endoftext|>, </s>, <|end_of_text|> in the vocabulary.

        Raises:
            ConfigError: the package or the end is missing, or a file is malformed.
        """
        try:
            from tokenizers import AddedToken, Tokenizer
        except ImportError:
            raise missing_package("huggingface", "tokenizers") from None
        data = read_bytes(path)
        try:
            library = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises plain Exception
            raise malformed(path, "huggingface", error) from None
        return cls._completed(path, data, library, AddedToken)

    @classmethod
    def _completed(
        cls, path: Path, data: bytes, library: Any, make_token: Callable[..., Any]
    ) -> HuggingFaceTokenizer:
        beside = _TokenFiles.read(path, library, make_token)
        # A file may set both from its training; a document must come out whole and unpadded.
        library.no_truncation()
        library.no_padding()
        rows = _entries(path.parent / "config.json").get("vocab_size")
        added, rowless = beside.add_to(library, rows if type(rows) is int else None)
        library.encode_special_tokens = beside.config.get("split_special_tokens") is True
        mended = _mend_mistral(path, library, beside.config)
        changes = [added, library.encode_special_tokens, mended]
        largest = max(library.get_vocab(with_added_tokens=True).values(), default=-1)
        ends = _ends(path, library, beside.named.get("eos_token"))
        eod = next((end for end in ends if end is not None and 0 <= end <= largest), None)
        if eod is None:
            tried = f"no eos_token in {_CONFIG}, no eos_token_id in config.json, no "
            raise no_end(path, f"{tried}({', '.join(_ENDS)})")
        # A file that nothing is added to keeps the fingerprint of its own bytes.
        data += json.dumps(changes).encode() if any(changes) else b""
        opening, notes = _opening(library), tuple(_notes(path, library, beside, rowless))
        sizes: dict[str, Any] = {"vocab_size": largest + 1, "eod": eod}
        return cls.make(path, data, library, **sizes, opening=opening, notes=notes)


@dataclass(frozen=True, kw_only=True)
class GPT2Tokenizer(_Encoding):
    """The tokenizer of GPT-2's ``vocab.json`` and ``merges.txt``: Megatron's GPT2BPETokenizer."""

    kind: ClassVar[str] = "gpt2"
    end: ClassVar[str] = _ENDS[0]

    @classmethod
    def read(cls, vocab: Path, merges: Path) -> GPT2Tokenizer:
        """Reads the two files; <|endoftext|> ends a document.

        Raises:
            ConfigError: the package or <|endoftext|> is missing, or a file is malformed.
        """
        try:
            from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        except ImportError:
            raise missing_package("gpt2", "tokenizers") from None
        data = read_bytes(vocab, VOCAB_FLAG) + read_bytes(merges, MERGE_FLAG)
        try:
            pieces = models.BPE.from_file(
                str(vocab), str(merges), continuing_subword_prefix="", end_of_word_suffix=""
            )
        except Exception as error:  # the library raises plain Exception
            raise malformed(vocab, "gpt2", error) from None
        library = Tokenizer(pieces)
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        eod = library.token_to_id(cls.end)
        if eod is None:
            raise no_end(vocab, f"no {cls.end}", VOCAB_FLAG)
        library.add_tokens([AddedToken(cls.end, special=True)])
        largest = max(library.get_vocab().values())
        return cls.make(vocab, data, library, vocab_size=largest + 1, eod=eod)


@dataclass(frozen=True, kw_only=True)
class _TokenFiles:
    """The tokens that the files beside a tokenizer.json name.

    Attributes:
        config: the entries of tokenizer_config.json, over those of special_tokens_map.json.
        listed: tokens by the id that a file gives them.
        named: tokens with a role, such as ``eos_token``.
        extra: further special tokens.
    """

    config: Mapping[str, Any]
    listed: Mapping[int, Any]
    named: Mapping[str, Any]
    extra: Sequence[Any]

    @classmethod
    def read(cls, path: Path, library: Any, make_token: Callable[..., Any]) -> _TokenFiles:
        """Reads the files in the order and with the precedence that transformers has.

        Raises:
            ConfigError: a file is malformed.
        """
        folder = path.parent
        config = _entries(folder / _CONFIG)
        listed: dict[int, Any] = {}
        try:
            if "added_tokens_decoder" in config:
                table = config["added_tokens_decoder"].items()
                listed = {int(index): _token(entry, make_token) for index, entry in table}
            else:
                config |= _entries(folder / "special_tokens_map.json")
            named, extra = _special_tokens(config, library, make_token)
            if "added_tokens_decoder" not in config:
                special = {token.content for token in (*named.values(), *extra)}
                for text, index in _entries(folder / "added_tokens.json").items():
                    listed[int(index)] = make_token(text, special=text in special)
                listed |= library.get_added_tokens_decoder()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise malformed(folder / _CONFIG, "huggingface", error) from None
        by_text = {token.content: token for token in listed.values()}
        named = {name: by_text.get(token.content, token) for name, token in named.items()}
        return cls(config=config, listed=listed, named=named, extra=extra)

    def add_to(self, library: Any, num_rows: int | None) -> tuple[list[list[Any]], list[str]]:
        """Adds the tokens that the library lacks, or has with other flags.

        Args:
            library: the tokenizer of the package ``tokenizers``.
            num_rows: rows of the embedding of the model beside it; None if there is no model.

        Returns:
            the tokens that were added, and the tokens with a role that the model has no row for.
        """
        there = library.get_added_tokens_decoder().values()
        same = {repr(token) for token in there}
        added = [token for _, token in sorted(self.listed.items()) if repr(token) not in same]
        texts = {token.content for token in (*there, *added)}
        roles = {token.content: token for token in self.named.values()}
        others = {token.content: token for token in self.extra}
        added += [token for text, token in (roles | others).items() if text not in texts]
        kept, rowless = [], []
        for token in added:
            token.special = token.special or token.content in roles
            if _is_rowless(token, library, num_rows) and token.content not in texts:
                rowless.append(token.content)
                continue
            library.add_tokens([token])
            kept.append([token.content, *(getattr(token, flag) for flag in _FLAGS)])
        return kept, rowless


def _special_tokens(
    config: Mapping[str, Any], library: Any, make_token: Callable[..., Any]
) -> tuple[dict[str, Any], list[Any]]:
    """The tokens with a role, in the order in which transformers adds them, and further ones."""
    extra, more = (config.get(f"{word}_special_tokens") or [] for word in ("extra", "additional"))
    others = {name: x for name, x in config.items() if name.endswith("_token")}
    padding = library.padding
    named = {name: others.pop(name, None) for name in _NAMED}
    if padding is not None and "pad_token" not in config:
        named["pad_token"] = padding["pad_token"]
    # Entries such as add_bos_token are switches.
    named |= {name: x for name, x in others.items() if isinstance(x, str | dict)}
    if isinstance(extra, dict):
        named, extra = named | extra, []
    extra = extra or more
    tokens = {name: _token(x, make_token) for name, x in named.items() if x is not None}
    return tokens, [_token(entry, make_token) for entry in extra]


def _token(entry: Any, make_token: Callable[..., Any]) -> Any:
    """A token of the library; a text alone is a special token."""
    if isinstance(entry, str):
        return make_token(entry, special=True)
    flags = {name: entry[name] for name in _FLAGS if name in entry}
    return make_token(entry["content"], **flags)


def _mend_mistral(path: Path, library: Any, config: Mapping[str, Any]) -> bool:
    """Cuts words as ``fix_mistral_regex`` of tokenizer_config.json asks; returns whether it did."""
    model = _entries(path.parent / "config.json")
    major = str(model.get("transformers_version") or "0").partition(".")[0]
    old = major.isdecimal() and int(major) < 5
    if config.get("fix_mistral_regex") is not True or not old or not model:
        return False
    if model.get("model_type") not in _MISTRALS or library.get_vocab_size() <= _LARGE_VOCABULARY:
        return False
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(pattern=Regex(_MISTRAL_PATTERN), behavior="isolated")
    before = library.pre_tokenizer
    if isinstance(before, pre_tokenizers.Sequence):
        before[0] = split
        return True
    if isinstance(before, pre_tokenizers.Metaspace):
        before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, before])
    return True


def _is_rowless(token: Any, library: Any, num_rows: int | None) -> bool:
    """Whether a new token would get an id that the model has no row for."""
    if num_rows is None or library.token_to_id(token.content) is not None:
        return False
    return max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1 >= num_rows


def _notes(path: Path, library: Any, beside: _TokenFiles, rowless: Sequence[str]) -> Iterator[str]:
    """What the user should know: the files disagree, and one of them is followed."""
    for text in rowless:
        yield f"the files beside {path} name {text}, but the model has no row for it: it is text"
    for index, token in beside.listed.items():
        found = library.token_to_id(token.content)
        if found != index:
            at = f"the files beside {path} give {token.content} the id {index}"
            yield f"{at}, but as in transformers its id is {found}"
    asked, has = beside.config.get("add_prefix_space"), _adds_space(library)
    if isinstance(asked, bool) and asked != has:
        does = "puts a space before a text" if has else "puts no space before a text"
        yield f"{_CONFIG} has add_prefix_space {asked}, but {path} {does}: the latter is followed"
    if beside.config.get("auto_map"):
        yield f"{_CONFIG} names Python code of its own, which is not run: {path} alone is followed"


def _adds_space(library: Any) -> bool:
    """Whether the tokenizer puts a space before a text that has none."""
    first, spaced = (library.encode(text, add_special_tokens=False).tokens for text in ("a", " a"))
    return bool(first) and first[0][0] in "\u2581\u0120" and first[0][0] == spaced[0][0]


def _opening(library: Any) -> tuple[int, ...]:
    """The ids that the post-processor puts before a text."""
    bare = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a", add_special_tokens=True).ids
    places = range(len(whole) - len(bare) + 1)
    return tuple(next((whole[:n] for n in places if whole[n : n + len(bare)] == bare), ()))


def _ends(path: Path, library: Any, named: Any) -> Iterator[int | None]:
    """The ids that may end a document, the most reliable source first."""
    yield None if named is None else library.token_to_id(named.content)
    number = _entries(path.parent / "config.json").get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    yield number if type(number) is int else None
    for text in _ENDS:
        yield library.token_to_id(text)


def _entries(path: Path) -> dict[str, Any]:
    """The entries of a JSON file; none if the file is missing."""
    try:
        value = json.loads(path.read_bytes())
    except OSError:
        return {}
    except (ValueError, RecursionError) as error:
        raise malformed(path, "huggingface", error) from None
    return value if isinstance(value, dict) else {}
