"""From ``--data-path`` to the rows of a run: datasets, their weights, their parts. No torch.

A path is one dataset::

    P, P.bin or P.idx    where both files are there: indexed data, as Megatron writes it
    P.jsonl, P.json      a text per line; with --sft a conversation per line
    any other            a text file, or a folder of them

``W1 P1 W2 P2`` gives weights; ``P1 P2`` takes rows of each in proportion to what it has.
Paths of text without weights are one dataset together.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from cp_megatron.config import DataConfig
from cp_megatron.data.read.chat import load_chats
from cp_megatron.data.read.indexed import IndexedDataset
from cp_megatron.data.read.json_lines import SUFFIXES, load_json_text
from cp_megatron.data.read.part import Part
from cp_megatron.data.read.sources import FLAG, Corpus, check_sources, load_corpus
from cp_megatron.data.rows.best_fit import PackedRows
from cp_megatron.data.rows.blend import BlendedRows
from cp_megatron.data.rows.sampler import (
    SPLIT_WORKS,
    Rows,
    RowSource,
    RowSplits,
    held_out,
    parse_split,
    split_rows,
    split_sizes,
)
from cp_megatron.data.tokenize.tokenizer import Tokenizer, open_tokenizer
from cp_megatron.errors import ConfigError

Kind = Literal["text", "json", "indexed"]
MOST_SCANNED = 1 << 28
"""Indexed data up to this many tokens is looked through for ids beyond the vocabulary at the start:
half a second. Of longer data each row is looked at when it is read, as every row is."""
PARTS = ("train", "valid", "test")
_SEED_STEP = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset as the user names it.

    Attributes:
        kind: how it is read.
        paths: what is read; empty means the sources of Python's standard library.
        weight: in the blend; None where weights are not given.
    """

    kind: Kind
    paths: tuple[str, ...]
    weight: Fraction | None


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads.

    Attributes:
        rows: to train, validate and test on.
        fingerprint: of the datasets, their weights, the tokenizer and the packing.
        name: what a person calls this data.
        notes: what a person should know of it.
    """

    rows: RowSplits
    fingerprint: str
    name: str
    notes: tuple[str, ...]


def path_lists(data: DataConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(flag, its words) of the paths to read: one list that is split, or one for each part."""
    own = (data.train_data_path, data.valid_data_path, data.test_data_path)
    if not any(own):
        return ((FLAG, data.data_path),)
    return tuple((f"--{part}-data-path", words) for part, words in zip(PARTS, own) if words)


def sources_of(words: Sequence[str], flag: str = FLAG) -> tuple[Source, ...]:
    """The datasets that the words of a flag name.

    Raises:
        ConfigError: weights are mixed with paths without one, or a weight is not above zero.
    """
    numbers = [_number(word) for word in words]
    if not words or all(number is None for number in numbers):
        kinds = [_kind(word) for word in words]
        if all(kind == "text" for kind in kinds):
            return (Source(kind="text", paths=tuple(words), weight=None),)
        return tuple(
            Source(kind=kind, paths=(word,), weight=None) for kind, word in zip(kinds, words)
        )
    paired = len(words) % 2 == 0
    if not paired or None in numbers[::2] or any(number is not None for number in numbers[1::2]):
        rule = "must be paths, or a weight before each path"
        raise ConfigError(flag, " ".join(words), rule, "0.7 FIRST 0.3 SECOND")
    found = []
    for weight, path in zip(numbers[::2], words[1::2]):
        if weight is None or weight <= 0:
            raise ConfigError(flag, " ".join(words), "a weight must be above zero", f"1 {path}")
        found.append(Source(kind=_kind(path), paths=(path,), weight=weight))
    return tuple(found)


def check_data(data: DataConfig) -> None:
    """Looks at the beginning of every dataset; ``open_data`` reads them.

    Raises:
        ConfigError: one of them can not be used, or flags contradict one another.
    """
    json_lines = False
    for flag, words in path_lists(data):
        for source in sources_of(words, flag):
            json_lines |= source.kind == "json"
            if data.sft and source.kind != "json":
                shown = ", ".join(source.paths) or "(none)"
                rule = "--sft reads conversations, a JSON object per line"
                raise ConfigError(flag, shown, rule, "a .jsonl file")
            with _said_of(flag):
                if source.kind == "indexed":
                    IndexedDataset.open(_prefix(source.paths[0]), flag=flag)
                else:
                    check_sources(source.paths, whole=source.kind == "text")
    if data.skip_bad_lines and not json_lines:
        rule = "has no effect: no path is a .jsonl file"
        raise ConfigError("--skip-bad-lines", "", rule, "leave it out")


def open_data(data: DataConfig, *, seed: int) -> Data:
    """Reads or maps every dataset and cuts it into rows.

    Args:
        data: with ``document_mask`` where the packing needs it.
        seed: of the order.

    Raises:
        ConfigError: a dataset can not be used, or has not a single row.
    """
    tokenizer = open_tokenizer(data.tokenizer_type, data.tokenizer_model)
    lists = path_lists(data)
    opened: list[_Opened] = []
    parts: dict[str, RowSource | None] = {}
    for flag, words in lists:
        sources = sources_of(words, flag)
        with _said_of(flag):
            found = [_open(source, data, tokenizer) for source in sources]
            weights = [source.weight for source in sources]
            parts |= _parts(flag, [one.corpus for one in found], weights, data, seed)
        opened += found
    train = parts["train"]
    assert train is not None, "a training part without a row is refused"
    return Data(
        rows=RowSplits(train=train, valid=parts["valid"], test=parts["test"]),
        fingerprint=_fingerprint(data, lists, opened, tokenizer),
        name=", ".join(one.corpus.name for one in opened),
        notes=(
            *(note for one in opened for note in one.notes),
            *_packing_notes(train),
            *_validation_notes(data, parts["valid"]),
        ),
    )


def _parts(
    flag: str,
    corpora: Sequence[Corpus],
    weights: Sequence[Fraction | None],
    data: DataConfig,
    seed: int,
) -> dict[str, RowSource | None]:
    """The rows of each part that the datasets of one flag are for."""
    own = flag.removeprefix("--").partition("-")[0]
    if own in PARTS[1:]:
        rows = _blend([_in_order(corpus, data) for corpus in corpora], weights)
        if rows is None:
            shown = ", ".join(corpus.name for corpus in corpora)
            rule = f"has not a single row of {data.seq_length} tokens"
            raise ConfigError(flag, shown, rule, "more data")
        return {own: rows}
    splits = []
    for number, corpus in enumerate(corpora):
        with _said_of_one(corpus, len(corpora)):
            one_seed = seed + number * _SEED_STEP
            splits.append(_split(corpus, data, seed=one_seed, whole=own == PARTS[0]))
    return {part: _blend([getattr(split, part) for split in splits], weights) for part in PARTS}


def open_single(data: DataConfig) -> Corpus:
    """The one dataset of ``--data-path``, whole.

    Raises:
        ConfigError: it can not be used, or there are several.
    """
    sources = sources_of(data.data_path)
    if len(sources) > 1:
        raise ConfigError(FLAG, " ".join(data.data_path), "must be one dataset here", "one path")
    return _open(sources[0], data, open_tokenizer(data.tokenizer_type, data.tokenizer_model)).corpus


@dataclass(frozen=True, kw_only=True)
class _Opened:
    corpus: Corpus
    notes: tuple[str, ...] = ()


def _open(source: Source, data: DataConfig, tokenizer: Tokenizer) -> _Opened:
    if source.kind == "indexed":
        return _Opened(corpus=_indexed(source.paths[0], tokenizer))
    if source.kind == "text":
        return _Opened(corpus=load_corpus(source.paths, tokenizer))
    (path,) = source.paths
    skip_bad = data.skip_bad_lines
    if not data.sft:
        corpus = load_json_text(path, tokenizer, skip_bad=skip_bad)
        return _Opened(corpus=corpus, notes=_counted(path, {"malformed lines": corpus.skipped}))
    chats = load_chats(path, tokenizer, seq_length=data.seq_length, skip_bad=skip_bad)
    counts = {
        "malformed lines": chats.corpus.skipped,
        "conversations without an answer in the first row": chats.dropped,
    }
    notes = _counted(path, counts)
    if chats.cut:
        notes += (f"{path}: {chats.cut:,} conversations are cut to {data.seq_length:,} tokens",)
    return _Opened(corpus=chats.corpus, notes=notes)


def _counted(path: str, counts: dict[str, int]) -> tuple[str, ...]:
    return tuple(f"{path}: {count:,} {what} left out" for what, count in counts.items() if count)


def _indexed(path: str, tokenizer: Tokenizer) -> Corpus:
    """Indexed data, its tokens mapped."""
    found = IndexedDataset.open(_prefix(path))
    if len(found.tokens) <= MOST_SCANNED:
        found.check_vocabulary(tokenizer.vocab_size)
    total = len(found.tokens)
    # Empty documents begin where the next one does.
    starts = np.unique(np.append(found.starts, total)[found.document_index[:-1]])
    return Corpus(
        tokens=found.tokens,
        document_starts=starts[starts < total],
        name=path,
        names=(Path(path).name,),
        fingerprint=found.fingerprint,
        skipped=0,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
    )


def _split(corpus: Corpus, data: DataConfig, *, seed: int, whole: bool) -> RowSplits:
    """The rows of a dataset's parts; ``whole``: all of it is for one part."""
    split = "1" if whole else data.split
    if data.packing == "concatenate":
        return split_rows(corpus, split=split, seq_length=data.seq_length, seed=seed)
    sizes = split_sizes(len(corpus.tokens), weights=parse_split(split), seq_length=data.seq_length)
    starts = np.append(corpus.document_starts, len(corpus.tokens))
    cuts = [0, *starts[np.searchsorted(starts, np.cumsum(sizes))].tolist()]
    train, valid, test = (corpus.part(*cut) for cut in pairwise(cuts))
    if not len(train.tokens):
        raise ConfigError("--split", data.split, "leaves nothing to train on", SPLIT_WORKS)
    return RowSplits(
        train=PackedRows(train, seq_length=data.seq_length, seed=seed),
        valid=_packed_in_order(valid, data.seq_length),
        test=_packed_in_order(test, data.seq_length),
    )


def _in_order(corpus: Corpus, data: DataConfig) -> Rows | PackedRows | None:
    """All rows of a dataset that is held out."""
    part = corpus.part(0, len(corpus.tokens))
    if data.packing == "concatenate":
        return held_out(part, data.seq_length)
    return _packed_in_order(part, data.seq_length)


def _packed_in_order(part: Part, seq_length: int) -> PackedRows | None:
    if not len(part.tokens):
        return None
    return PackedRows(part, seq_length=seq_length, seed=0, shuffle=False)


def _blend(
    rows: Sequence[RowSource | None], weights: Sequence[Fraction | None]
) -> RowSource | None:
    """The rows of a part of every dataset; those that have no row in it are left out."""
    there = [(source, weight) for source, weight in zip(rows, weights) if source is not None]
    if len(there) <= 1:
        return there[0][0] if there else None
    given = [weight for _, weight in there if weight is not None]
    return BlendedRows([source for source, _ in there], given or None)


def _packing_notes(train: RowSource) -> tuple[str, ...]:
    sources = train.sources if isinstance(train, BlendedRows) else (train,)
    packings = [source.packing for source in sources if isinstance(source, PackedRows)]
    if not packings:
        return ()
    num_rows = sum(packing.num_rows for packing in packings)
    waste = sum(packing.num_rows * packing.waste for packing in packings) / num_rows
    return (f"{num_rows:,} packed rows of whole documents, {waste:.2%} padding",)


def _validation_notes(data: DataConfig, valid: RowSource | None) -> tuple[str, ...]:
    """A part that ``--split`` asks for may turn out to be empty: it is shorter than a row, or the
    data is one document, which ``best-fit`` does not cut in two."""
    if data.train_data_path or valid is not None or not parse_split(data.split)[1]:
        return ()
    return (f"--split {data.split} leaves validation not a single row: nothing is validated",)


def _fingerprint(
    data: DataConfig,
    lists: Sequence[tuple[str, tuple[str, ...]]],
    opened: Sequence[_Opened],
    tokenizer: Tokenizer,
) -> str:
    """Of one dataset of bytes in plain rows its own, else a digest of all that decides rows."""
    corpora = [one.corpus.fingerprint for one in opened]
    plain = tokenizer.kind == "byte" and data.packing == "concatenate" and not data.sft
    if plain and len(corpora) == 1 and lists[0][0] == FLAG:
        return corpora[0]
    weights = [
        [flag, [str(source.weight) for source in sources_of(words, flag)]] for flag, words in lists
    ]
    settings = [corpora, weights, tokenizer.fingerprint, data.packing, data.sft]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _number(word: str) -> Fraction | None:
    """The weight that a word is; None for a path."""
    try:
        number = float(word)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if number == 0:  # as a fraction, 1e-99999999 would take minutes
        return Fraction(0)
    try:
        return Fraction(word)
    except ValueError:
        return Fraction(number)


def _kind(path: str) -> Kind:
    prefix = _prefix(path)
    # A text may have any name, .bin too; .idx alone, or P.bin where P is asked for, is half a pair.
    half = not os.path.exists(path) and os.path.isfile(f"{prefix}.bin")
    if half or path.endswith(".idx") or os.path.isfile(f"{prefix}.idx"):
        return "indexed"
    return "json" if path.endswith(SUFFIXES) and not os.path.isdir(path) else "text"


def _prefix(path: str) -> str:
    """Of P, P.bin and P.idx: P."""
    return path[:-4] if path.endswith((".bin", ".idx")) else path


@contextmanager
def _said_of_one(corpus: Corpus, count: int) -> Iterator[None]:
    """Of several datasets, the one that is too short is told."""
    try:
        yield
    except ConfigError as error:
        if count == 1:
            raise
        rule = f"{corpus.name}: {error.rule}"
        raise ConfigError(error.flag, error.value, rule, error.works) from None


@contextmanager
def _said_of(flag: str) -> Iterator[None]:
    """What is wrong with a path is told of the flag that named it."""
    try:
        yield
    except ConfigError as error:
        if error.flag != FLAG or flag == FLAG:
            raise
        raise ConfigError(flag, error.value, error.rule, error.works) from None
