"""Reads the datasets of a run and cuts them into the rows of its parts."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cp_megatron.config import DataConfig
from cp_megatron.config.fields import settings
from cp_megatron.data.read.chat import chat_writer, check_chats, load_chats
from cp_megatron.data.read.chat_examples import Writer
from cp_megatron.data.read.chat_files import check_chat_file
from cp_megatron.data.read.compression import name_unpacked
from cp_megatron.data.read.corpus import Corpus, CorpusRange
from cp_megatron.data.read.document_corpus import check_documents, load_documents
from cp_megatron.data.read.documents import left_out
from cp_megatron.data.read.indexed import IndexedDataset
from cp_megatron.data.read.text_files import FLAG, check_text_files, load_text_files
from cp_megatron.data.rows.best_fit import PackedRows
from cp_megatron.data.rows.blend import BlendedRows
from cp_megatron.data.rows.dataset_paths import PARTS, DatasetSpec, parse_datasets, path_lists
from cp_megatron.data.rows.sampler import (
    SPLIT_WORKS,
    ConcatenatedRows,
    RowSource,
    RowSplits,
    parse_split,
    split_sizes,
)
from cp_megatron.data.tokenize.chat_template import DATE_FLAG
from cp_megatron.data.tokenize.open_tokenizer import tokenizer_of
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

MOST_SCANNED = 1 << 28
"""At startup, indexed data of up to this many tokens is scanned for invalid ids, which takes half a
second. For longer data, each row is checked only when it is read, as all rows are."""
_SEED_STEP = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a run.

    Attributes:
        rows: the rows to train, validate and test on.
        fingerprint: a digest of the datasets, their weights, the tokenizer and the packing.
        name: the name of the data for messages.
        notes: lines about the data for the user.
    """

    rows: RowSplits
    fingerprint: str
    name: str
    notes: tuple[str, ...]


def check_data(data: DataConfig, *, dry_run: bool = False) -> tuple[str, ...]:
    """Looks at the beginning of every dataset; ``open_data`` reads them.

    Args:
        data: where they are.
        dry_run: also return notes about the first conversations.

    Returns:
        lines about the data for the user.

    Raises:
        ConfigError: a dataset cannot be used, or flags contradict one another.
    """
    lined, told = False, list[str]()
    write: Writer | None = None
    if data.chat_date is not None and not data.sft:
        raise ConfigError(DATE_FLAG, data.chat_date, "has no effect without --sft", "leave it out")
    for flag, words in path_lists(data):
        for spec in parse_datasets(words, flag, sft=data.sft):
            lined |= spec.lined
            told += [spec.note] * bool(spec.note)
            with _named(flag):
                if data.sft:
                    kind = check_chat_file(spec.given)
                    write = write or chat_writer(tokenizer_of(data), data.chat_date)
                    notes = check_chats(spec.given, kind, write, skip_bad=data.skip_bad_lines)
                    told += notes if dry_run else ()
                elif spec.kind == "indexed":
                    IndexedDataset.open(spec.paths[0], flag=flag)
                else:
                    check_text_files(spec.paths, judged=spec.kind == "text")
                    told += left_out(spec.paths)
                if spec.kind in ("json", "table"):
                    skip, command = data.skip_bad_lines, prepare_command(data, spec.given)
                    check_documents(spec.paths, skip_bad=skip, command=command)
    if data.skip_bad_lines and not lined:
        rule = "has no effect, because no path has lines or rows that can be malformed"
        raise ConfigError("--skip-bad-lines", "", rule, "leave it out")
    return tuple(told)


def prepare_command(data: DataConfig, path: str) -> str:
    """The command that prepares a path for a run, without its ``--json-keys``."""
    prefix = path.rstrip("/")
    if os.path.isfile(path):
        prefix = os.path.splitext(path[: len(name_unpacked(path))])[0]
    words = ["python", "launch/prepare_data.py", "--input", path, "--output-prefix", prefix]
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    for name in names if data.tokenizer_type != "byte" else ():
        if (value := getattr(data, name)) is not None:
            words += [settings()[name].flag, value]
    return shlex.join(words)


def open_data(data: DataConfig, *, seed: int) -> Data:
    """Reads or maps every dataset and cuts it into rows.

    Args:
        data: with ``document_mask`` set if the packing needs it.
        seed: the seed of the order of the rows.

    Raises:
        ConfigError: a dataset cannot be used, or has not a single row.
    """
    tokenizer = tokenizer_of(data)
    lists = [(flag, parse_datasets(words, flag, sft=data.sft)) for flag, words in path_lists(data)]
    corpora: list[Corpus] = []
    notes: list[str] = []
    parts: dict[str, RowSource | None] = {}
    for flag, specs in lists:
        with _named(flag):
            opened = [_open(spec, data, tokenizer, notes) for spec in specs]
            parts |= _parts(flag, opened, specs, data, seed)
        corpora += opened
    assert parts["train"] is not None, "a training part without a row is refused"
    rows = RowSplits(train=parts["train"], valid=parts["valid"], test=parts["test"])
    return Data(
        rows=rows,
        fingerprint=_fingerprint(data, lists, corpora, tokenizer),
        name=", ".join(corpus.name for corpus in corpora),
        notes=(*notes, *_row_notes(data, rows)),
    )


def open_single(data: DataConfig) -> Corpus:
    """Reads or maps the one dataset of ``--data-path``.

    Raises:
        ConfigError: it cannot be used, or there are several.
    """
    specs = parse_datasets(data.data_path, sft=data.sft)
    if len(specs) > 1:
        raise ConfigError(FLAG, " ".join(data.data_path), "must be one dataset here", "one path")
    return _open(specs[0], data, tokenizer_of(data), [])


def _parts(
    flag: str, corpora: Sequence[Corpus], specs: Sequence[DatasetSpec], data: DataConfig, seed: int
) -> dict[str, RowSource | None]:
    """The rows of each part that the datasets of one flag are for."""
    own = flag.removeprefix("--").partition("-")[0]
    if own in PARTS[1:]:
        rows = _blend([_rows(corpus, data) for corpus in corpora], specs)
        if rows is None:
            names = ", ".join(corpus.name for corpus in corpora)
            rule = f"has not a single row of {data.seq_length} tokens"
            raise ConfigError(flag, names, rule, "more data")
        return {own: rows}
    splits = []
    for number, corpus in enumerate(corpora):
        with _named("", corpus.name if len(corpora) > 1 else ""):
            one_seed = seed + number * _SEED_STEP
            splits.append(_split(corpus, data, seed=one_seed, whole=own == PARTS[0]))
    return {part: _blend([getattr(split, part) for split in splits], specs) for part in PARTS}


def _open(spec: DatasetSpec, data: DataConfig, tokenizer: Tokenizer, notes: list[str]) -> Corpus:
    """Reads or maps a dataset, and adds what the user should know about it to ``notes``."""
    path, length, skip_bad = spec.given, data.seq_length, data.skip_bad_lines
    if spec.kind == "indexed":
        return _indexed(spec, tokenizer)
    if spec.kind == "text":
        texts = load_text_files(spec.paths, tokenizer)
        if texts.skipped:
            notes.append(f"{path}: {texts.skipped:,} files are not text and are left out")
        return texts
    if spec.kind == "chats":
        corpus, told = load_chats(
            path, tokenizer, seq_length=length, skip_bad=skip_bad, date=data.chat_date
        )
        notes += told
        return corpus
    command = prepare_command(data, path)
    corpus = load_documents(spec.paths, tokenizer, skip_bad=skip_bad, command=command)
    if corpus.skipped:
        notes.append(f"{path}: {corpus.skipped:,} malformed lines left out")
    return corpus


def _indexed(spec: DatasetSpec, tokenizer: Tokenizer) -> Corpus:
    """Indexed data, its tokens mapped."""
    pair = IndexedDataset.open(spec.paths[0])
    total = len(pair.tokens)
    if total <= MOST_SCANNED:
        pair.check_vocabulary(tokenizer.vocab_size)
    # An empty document begins where the next one does.
    starts = np.unique(np.append(pair.starts, total)[pair.document_index[:-1]])
    return Corpus(
        tokens=pair.tokens,
        document_starts=starts[starts < total],
        name=spec.given,
        fingerprint=pair.fingerprint,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
    )


def _split(corpus: Corpus, data: DataConfig, *, seed: int, whole: bool) -> RowSplits:
    """The rows of a dataset's parts; no token is in two. ``whole``: all of it is for training."""
    size, weights = len(corpus.tokens), parse_split("1" if whole else data.split)
    sizes = split_sizes(size, weights=weights, seq_length=data.seq_length)
    cuts = np.cumsum([0, *sizes])
    if data.packing == "best-fit":
        starts = np.append(corpus.document_starts, size)
        cuts = starts[np.searchsorted(starts, cuts)]
    elif sizes[0] <= data.seq_length:
        rule = f"a row needs {data.seq_length + 1} tokens, the training part of the data has "
        works = f"--seq-length up to {sizes[0] - 1}, or more data" if sizes[0] > 1 else "more data"
        raise ConfigError("--seq-length", data.seq_length, f"{rule}{sizes[0]}", works)
    train, valid, test = (corpus.range(*cut) for cut in pairwise(cuts.tolist()))
    rows = _rows(train, data, seed)
    if rows is None:
        raise ConfigError("--split", data.split, "leaves nothing to train on", SPLIT_WORKS)
    return RowSplits(train=rows, valid=_rows(valid, data), test=_rows(test, data))


def _rows(tokens: CorpusRange, data: DataConfig, seed: int | None = None) -> RowSource | None:
    """The rows of a range, in order if there is no seed; None if there is not a single row."""
    concatenate = data.packing == "concatenate"
    if len(tokens.tokens) <= (data.seq_length if concatenate else 0):
        return None
    kind = ConcatenatedRows if concatenate else PackedRows
    return kind(tokens, seq_length=data.seq_length, seed=seed or 0, shuffle=seed is not None)


def _blend(rows: Sequence[RowSource | None], specs: Sequence[DatasetSpec]) -> RowSource | None:
    """The rows of one part of every dataset; datasets without a row in it are left out."""
    there = [(source, spec.weight) for source, spec in zip(rows, specs) if source is not None]
    if len(there) <= 1:
        return there[0][0] if there else None
    given = [weight for _, weight in there if weight is not None]
    return BlendedRows([source for source, _ in there], given or None)


def _row_notes(data: DataConfig, rows: RowSplits) -> Iterator[str]:
    """Notes for the user about packing and validation.

    Validation may be empty although ``--split`` asks for it: the part is shorter than a row, or the
    data is one document, which ``best-fit`` does not split.
    """
    sources = rows.train.sources if isinstance(rows.train, BlendedRows) else (rows.train,)
    packings = [source.packing for source in sources if isinstance(source, PackedRows)]
    if packings:
        num_rows = sum(packing.num_rows for packing in packings)
        waste = sum(packing.num_rows * packing.waste for packing in packings) / num_rows
        yield f"{num_rows:,} packed rows of whole documents, {waste:.2%} padding"
    if not data.train_data_path and rows.valid is None and parse_split(data.split)[1]:
        yield f"--split {data.split} leaves validation not a single row: nothing is validated"


def _fingerprint(
    data: DataConfig,
    lists: Sequence[tuple[str, Sequence[DatasetSpec]]],
    corpora: Sequence[Corpus],
    tokenizer: Tokenizer,
) -> str:
    """A digest of all that decides the rows.

    One dataset of bytes in concatenated rows keeps its own fingerprint.
    """
    fingerprints = [corpus.fingerprint for corpus in corpora]
    plain = tokenizer.kind == "byte" and data.packing == "concatenate" and not data.sft
    if plain and len(corpora) == 1 and lists[0][0] == FLAG:
        return fingerprints[0]
    weights = [[flag, [str(spec.weight) for spec in specs]] for flag, specs in lists]
    settings = [fingerprints, weights, tokenizer.fingerprint, data.packing, data.sft]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


@contextmanager
def _named(flag: str, dataset: str = "") -> Iterator[None]:
    """Adds the flag that gave a path, or the dataset that is too short, to an error."""
    try:
        yield
    except ConfigError as error:
        renamed = flag if flag and error.flag == FLAG else error.flag
        rule = f"{dataset}: {error.rule}" if dataset else error.rule
        raise ConfigError(renamed, error.value, rule, error.works) from None
