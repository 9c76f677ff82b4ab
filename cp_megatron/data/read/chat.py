"""Reads files of conversations as documents, with a loss on the assistant's answers only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime

import numpy as np

from cp_megatron.data.read.chat_examples import Conversation, Writer, Written, writer
from cp_megatron.data.read.chat_files import WORKS, check_chat_file, read_records
from cp_megatron.data.read.chat_records import read_record
from cp_megatron.data.read.chat_turns import RecordError
from cp_megatron.data.read.corpus import Corpus
from cp_megatron.data.read.file_kinds import FileKind
from cp_megatron.data.read.json_lines import BadLineError
from cp_megatron.data.read.text_files import FLAG
from cp_megatron.data.tokenize.chat_template import DATE_FLAG, find_template
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

_SKIP = "--skip-bad-lines to leave such records out"


def load_chats(
    path: str, tokenizer: Tokenizer, *, seq_length: int, skip_bad: bool, date: str | None = None
) -> tuple[Corpus, list[str]]:
    """Reads a file of conversations.

    Args:
        path: the file.
        tokenizer: its chat template is used.
        seq_length: longer conversations are cut to this length, because the model would read the
            rest without its context.
        skip_bad: leave malformed records out and count them.
        date: the day that the template may write, YYYY-MM-DD.

    Returns:
        a document for each example, and notes for the user.

    Raises:
        ConfigError: a record is malformed, no conversation is left, or the template cannot be used.
    """
    told = _Told()
    kept: list[Conversation] = []
    num_records = dropped = 0
    kind, write = check_chat_file(path), chat_writer(tokenizer, date)
    for written in _written(path, kind, write, told, skip_bad=skip_bad):
        examples = [each for each in written.examples if each[1][1:seq_length].any()]
        num_records += 1
        dropped += max(1, len(written.examples)) - len(examples)
        kept += examples
    if not kept:
        rule = f"holds no conversation with an answer within {seq_length} tokens"
        raise told.refusal(path, rule, "a longer --seq-length, or other data")
    lengths = np.array([min(len(tokens), seq_length) for tokens, _ in kept], dtype=np.int64)
    tokens, loss = (np.concatenate([each[:seq_length] for each in part]) for part in zip(*kept))
    # The result is hashed, because the template decides it too, and no other fingerprint has it.
    digest = hashlib.sha256(lengths.tobytes())
    for array in (tokens, loss):
        digest.update(array.tobytes())
    corpus = Corpus(
        tokens=tokens,
        document_starts=np.cumsum(lengths) - lengths,
        name=path,
        fingerprint=digest.hexdigest(),
        skipped=told.bad,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
        loss=loss,
    )
    counts = {
        "malformed lines left out": told.bad,
        "conversations without an answer in the first row left out": dropped,
        f"conversations are cut to {seq_length:,} tokens": sum(
            len(tokens) > seq_length for tokens, _ in kept
        ),
    }
    notes = [f"{path}: {count:,} {what}" for what, count in counts.items() if count]
    return corpus, notes + told.notes(path, num_records)


def check_chats(path: str, kind: FileKind, write: Writer, *, skip_bad: bool) -> list[str]:
    """Reads and writes the first records of a file, and returns notes about them.

    Raises:
        ConfigError: as ``load_chats``, for these records.
    """
    told = _Told()
    num_records = sum(1 for _ in _written(path, kind, write, told, skip_bad=skip_bad, probe=True))
    if not num_records:
        raise told.refusal(path, "holds no conversation", WORKS)
    return [f"{note} (of the first {num_records})" for note in told.notes(path, num_records)]


def chat_writer(tokenizer: Tokenizer, date: str | None) -> Writer:
    """Returns what writes conversations for a tokenizer.

    Raises:
        ConfigError: the date is not YYYY-MM-DD, or the chat template cannot be used.
    """
    try:
        today = None if date is None else datetime.strptime(date, "%Y-%m-%d")
    except ValueError:
        raise ConfigError(DATE_FLAG, str(date), "must be YYYY-MM-DD", "2026-01-31") from None
    return writer(tokenizer, find_template(tokenizer, today=today))


class _Told:
    """Collects what the user is told about a file."""

    def __init__(self) -> None:
        self.bad = 0
        self.first_bad = self.first_works = ""
        self.remarks: dict[str, tuple[int, str, str]] = {}

    def add(self, where: str, written: Written) -> None:
        """Counts the remarks on a record, each kind once."""
        for what, instance in reversed(written.remarks):
            count, first, shown = self.remarks.get(what, (0, where, instance))
            self.remarks[what] = (count + (what in dict(written.remarks)), first, shown)

    def notes(self, path: str, num_records: int) -> list[str]:
        """A line for each kind of remark."""
        return [
            f"{path}: {count:,} of {num_records:,} conversations {what}; the first in {where}: "
            f"{shown}"
            for what, (count, where, shown) in self.remarks.items()
        ]

    def refusal(self, path: str, rule: str, works: str) -> ConfigError:
        """The error for a file of which nothing is left."""
        if self.bad:
            rule = f"{rule}; {self.bad:,} records are left out, the first: {self.first_bad}"
            works = self.first_works
        return ConfigError(FLAG, path, rule, works)


def _written(
    path: str, kind: FileKind, write: Writer, told: _Told, *, skip_bad: bool, probe: bool = False
) -> Iterator[Written]:
    """Writes the records of a file that are not bad."""
    for where, value in read_records(path, kind, probe=probe):
        try:
            if isinstance(value, BadLineError):
                raise value
            written = write(read_record(value))
        except BadLineError as error:
            reason, works = f"{where}: {error}", "correct or remove it"
            if isinstance(error, RecordError):
                works = error.works
            if not skip_bad:
                works += "" if isinstance(error, RecordError) else f", or {_SKIP}"
                raise ConfigError(FLAG, path, reason, works) from None
            if not told.bad:
                told.first_bad, told.first_works = reason, works
            told.bad += 1
            continue
        told.add(where, written)
        yield written
