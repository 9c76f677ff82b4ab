"""Reads JSON and tables as a corpus when a run starts: the texts under the key ``text``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from cp_megatron.data.read.corpus import Corpus
from cp_megatron.data.read.documents import (
    DocumentBatch,
    InputFile,
    cut_spans,
    find_inputs,
    read_span,
)
from cp_megatron.data.read.json_lines import KEYS_FLAG
from cp_megatron.data.read.text_files import FLAG, MOST_TOKENISED, PREPARED, check_size, tokenised
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

_KEY = "text"


def check_documents(paths: Sequence[str], *, skip_bad: bool, command: str) -> None:
    """Reads the first documents of every file.

    Args:
        paths: files, and folders with data.
        skip_bad: leave malformed lines out.
        command: prepares the same data, for messages.

    Raises:
        ConfigError: a file cannot be read, or a document has no text under the key ``text``; if
            malformed lines are left out, all of the first ones are malformed.
    """
    with _explained(paths, command):
        for file in _files(paths):
            for span in islice(cut_spans([file], span_bytes=MOST_TOKENISED), 1):
                first = next(read_span(span, (_KEY,), skip_bad_lines=skip_bad), None)
                if first is not None and first.skipped and not first.texts[0]:
                    next(read_span(span, (_KEY,), skip_bad_lines=False))  # all would be skipped


def load_documents(
    paths: Sequence[str], tokenizer: Tokenizer, *, skip_bad: bool, command: str
) -> Corpus:
    """Reads and tokenises every document; empty ones are left out.

    Args:
        paths: files, and folders with data.
        tokenizer: turns the text into ids.
        skip_bad: leave malformed lines out and count them.
        command: prepares the same data, for messages.

    Raises:
        ConfigError: as ``check_documents``; or there is no text, or too much to tokenise when a run
            starts.
    """
    documents: list[bytes] = []
    names: list[str] = []
    skipped = size = 0
    with _explained(paths, command):
        for path, count, batch in _batches(paths, skip_bad):
            # Rows of Parquet are counted without those that are empty.
            places = batch.places or range(count + 1, count + 1 + len(batch.texts[0]))
            names += [f"{Path(path).name}:{place}" for place in places]
            documents += [text.encode() for text in batch.texts[0]]
            skipped += len(batch.skipped)
            size += sum(map(len, documents[-len(places) :])) if places else 0
            check_size(path, size, MOST_TOKENISED)
    name = ", ".join(paths)
    if not documents:
        raise ConfigError(FLAG, name, "holds no text", '{"text": "..."} on each line')
    return tokenised(documents, tokenizer, names=names, name=name, skipped=skipped)


def _batches(paths: Sequence[str], skip_bad: bool) -> Iterator[tuple[str, int, DocumentBatch]]:
    """The batches of all files, each with its file and the documents of the file before it."""
    for file in _files(paths):
        count = 0
        for span in cut_spans([file], span_bytes=MOST_TOKENISED + 1):
            for batch in read_span(span, (_KEY,), skip_bad_lines=skip_bad):
                yield file.path, count, batch
                count += len(batch.texts[0])


def _files(paths: Sequence[str]) -> Iterator[InputFile]:
    """The files of the paths; JSON and tables of text may not be too large."""
    for file in find_inputs(paths):
        if file.kind.format not in ("parquet", "arrow"):
            check_size(file.path, file.size, MOST_TOKENISED)
        yield file


@contextmanager
def _explained(paths: Sequence[str], command: str) -> Iterator[None]:
    """Answers a missing key, and too much text, by the command that prepares the data."""
    try:
        yield
    except ConfigError as error:
        flag, value, rule, works = error.flag, error.value, error.rule, error.works
        if flag == KEYS_FLAG:
            value, rule = ", ".join(paths), f"{value!r} {rule}"
        if PREPARED in works:
            works = command
        elif works.startswith(KEYS_FLAG):
            works = f"{command} {works}"
        flag = FLAG if flag in ("--input", KEYS_FLAG) else flag
        raise ConfigError(flag, value, rule, works) from None
