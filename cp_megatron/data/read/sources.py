"""Where tokens come from: text files as documents.

A document is one file: its tokens (by default one per byte), then the end of the document. Nothing
here imports torch.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.part import Part
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

Tokens = npt.NDArray[np.uint16]

EOD = 256
"""The token that ends every document."""
VOCAB_SIZE = 257
"""256 byte values and ``EOD``."""

FLAG = "--data-path"
WORKS = "a text file in UTF-8, or a folder that holds some"
PROBE_BYTES = 1 << 16
PIECE_BYTES = 1 << 24
MOST_BYTES = 4 << 30
"""The most text that is read as bytes at the start of a run."""
MOST_TOKENISED = 128 << 20
"""The most text that a tokenizer is run over at the start of a run: half a minute or so."""
# Not Python that somebody wrote: installed packages, tests, and folders generated from tables.
STDLIB_SKIPPED = frozenset(
    {
        *("site-packages", "dist-packages", "__pycache__", "test", "tests"),
        *("idlelib", "lib2to3", "encodings", "pydoc_data"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All documents one after the other.

    Attributes:
        tokens: integers [n]; of text every document is followed by ``eod``.
        document_starts: int64 [documents], where each document begins in ``tokens``.
        name: what a person calls this data.
        names: relative name of each document, in order.
        fingerprint: SHA-256 (hex) over the relative names, sizes and contents, so the same
            files give the same fingerprint wherever they lie.
        skipped: files in the given folders that are not text (or can not be read).
        eod: the token that ends documents, where one does.
        vocab_size: of the tokenizer.
        loss: bool [n], whether a token is to be predicted; None where every token is.
    """

    tokens: npt.NDArray[np.integer]
    document_starts: npt.NDArray[np.int64]
    name: str
    names: tuple[str, ...]
    fingerprint: str
    skipped: int
    eod: int = EOD
    vocab_size: int = VOCAB_SIZE
    loss: npt.NDArray[np.bool_] | None = None

    def part(self, start: int, stop: int) -> Part:
        """Tokens [start, stop), as a view."""
        low, high = np.searchsorted(self.document_starts, [start, stop])
        return Part(
            tokens=self.tokens[start:stop],
            document_starts=self.document_starts[low:high] - start,
            eod=self.eod,
            vocab_size=self.vocab_size,
            offset=start,
            name=self.name,
            loss=None if self.loss is None else self.loss[start:stop],
        )


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file to read; ``explicit`` when the user named the file itself."""

    path: Path
    name: str
    explicit: bool


def encode(text: str) -> Tokens:
    """Tokens of a text, uint16 [bytes of its UTF-8], without an end of document."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)


def decode(tokens: npt.ArrayLike) -> str:
    """Text of tokens; ends of documents are left out, bytes that are no UTF-8 become U+FFFD.

    Raises:
        ValueError: a token lies outside [0, ``VOCAB_SIZE``).
    """
    values = np.asarray(tokens, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= VOCAB_SIZE):
        raise ValueError(f"tokens must lie in [0, {VOCAB_SIZE})")
    data: bytes = values[values != EOD].astype(np.uint8).tobytes()
    return data.decode("utf-8", errors="replace")


def check_sources(paths: Sequence[str], *, whole: bool = True) -> None:
    """Looks at the beginning of the files only, in milliseconds; ``load_corpus`` reads them whole.

    Args:
        paths: files and folders; empty means the sources of Python's standard library.
        whole: a file must be text as a whole; else each of its lines is to be judged on its own.

    Raises:
        ConfigError: a path is missing, empty or not text, or a folder holds no text file.
    """
    for path, files in _listing(paths):
        if not any(_begins_as_text(file, whole) for file in files):
            raise _no_text(path)


def load_corpus(paths: Sequence[str], tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads every document.

    Args:
        paths: files and folders (read recursively by name, a folder's files before its folders,
            without hidden entries); empty means the sources of Python's standard library. In a
            folder, files that are not text are skipped and counted, empty ones are ignored.
        tokenizer: of the text; by default a token per byte.

    Raises:
        ConfigError: as ``check_sources``, for the whole contents; or the text is too long to be
            made into tokens at the start of a run.
    """
    most = MOST_BYTES if tokenizer is None or tokenizer.kind == "byte" else MOST_TOKENISED
    documents: list[bytes] = []
    names: list[str] = []
    skipped = size = 0
    for path, files in _listing(paths):
        before = len(documents)
        for file in files:
            data = _read_text(file)
            if data is None:
                skipped += 1
            elif data:
                documents.append(data)
                names.append(file.name)
                size += len(data)
                check_size(path, size, most)
        if len(documents) == before:
            raise _no_text(path)
    return corpus_of(
        documents,
        names=names,
        name=", ".join(paths) if paths else "the sources of Python's standard library",
        skipped=skipped,
        tokenizer=tokenizer,
    )


def check_size(path: str, size: int, most: int) -> None:
    """Refuses text that would take minutes to be made into tokens, on every rank alike."""
    if size > most:
        rule = f"is more than the {most >> 20} MiB of text that are made into tokens at the start"
        raise ConfigError(FLAG, path, rule, "the .bin/.idx that launch/prepare_data.py makes of it")


def corpus_of(
    documents: Sequence[bytes],
    *,
    names: Sequence[str],
    name: str,
    skipped: int,
    tokenizer: Tokenizer | None,
) -> Corpus:
    """The corpus of documents in UTF-8, each with its end.

    Args:
        documents: at least one; none is empty.
        names: of each.
        name: of all.
        skipped: files (or lines) that are none.
        tokenizer: by default a token per byte.
    """
    if tokenizer is None or tokenizer.kind == "byte":
        tokens, starts = _concatenate(
            [np.frombuffer(document, dtype=np.uint8) for document in documents], EOD, np.uint16
        )
    else:
        ids = tokenizer.encode_batch([document.decode("utf-8") for document in documents])
        tokens, starts = _concatenate(ids, tokenizer.eod, np.int32)
    return Corpus(
        tokens=tokens,
        document_starts=starts,
        name=name,
        names=tuple(names),
        fingerprint=_fingerprint(names, documents),
        skipped=skipped,
        eod=EOD if tokenizer is None else tokenizer.eod,
        vocab_size=VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size,
    )


def _concatenate(
    documents: Sequence[npt.NDArray[np.integer]], eod: int, dtype: npt.DTypeLike
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
    lengths = np.array([len(document) + 1 for document in documents], dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens: npt.NDArray[np.integer] = np.full(int(ends[-1]), eod, dtype=dtype)
    starts = ends - lengths
    for start, document in zip(starts.tolist(), documents):
        tokens[start : start + len(document)] = document
    tokens.setflags(write=False)
    return tokens, starts


def _fingerprint(names: Sequence[str], documents: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for name, document in zip(names, documents):
        # The length of the name too, or a name could pass for the end of another document.
        label = name.encode("utf-8", errors="surrogateescape")
        digest.update(f"{len(label)} {len(document)} ".encode())
        digest.update(label)
        digest.update(document)
    return digest.hexdigest()


def _listing(paths: Sequence[str]) -> Iterator[tuple[str, Iterator[_File]]]:
    """The files of each path the user gave, lazily."""
    if not paths:
        yield "", _walk(Path(sysconfig.get_path("stdlib")), _is_library_source, STDLIB_SKIPPED)
    for given in paths:
        path = Path(given)
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError):
            raise ConfigError(FLAG, given, "there is no such file or folder", _near(path)) from None
        if stat.S_ISDIR(mode):
            yield given, _walk(path, _is_visible, frozenset())
        elif stat.S_ISREG(mode):
            yield given, iter([_File(path=path, name=path.name, explicit=True)])
        else:
            raise ConfigError(FLAG, given, "must be a regular file or a folder", WORKS)


def _walk(
    root: Path, wanted: Callable[[str], bool], skipped_folders: frozenset[str]
) -> Iterator[_File]:
    """Files below a folder, by name, a folder's files before its folders."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if _is_visible(name) and name not in skipped_folders
        )
        for name in sorted(filter(wanted, files)):
            path = Path(folder, name)
            if path.is_file():
                yield _File(path=path, name=path.relative_to(root).as_posix(), explicit=False)


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _is_library_source(name: str) -> bool:
    # _sysconfigdata is generated and full of the paths of the machine that built Python.
    return name.endswith(".py") and not name.startswith("_sysconfigdata")


def _begins_as_text(file: _File, judged: bool) -> bool:
    """Whether the file has text at its beginning; an explicit file that has not is refused."""
    try:
        with file.path.open("rb") as stream:
            beginning = stream.read(PROBE_BYTES)
            whole = len(beginning) < PROBE_BYTES
    except OSError as error:
        return _refuse_explicit(file, _unreadable(error))
    if not beginning:
        return _refuse_explicit(file, "the file is empty")
    return (
        not judged
        or _is_text(beginning, whole)
        or _refuse_explicit(file, "the file is not UTF-8 text")
    )


def _read_text(file: _File) -> bytes | None:
    """The file's bytes (none for an empty file), or None when it is not text."""
    try:
        data = file.path.read_bytes()
    except OSError as error:
        _refuse_explicit(file, _unreadable(error))
        return None
    if not data:
        _refuse_explicit(file, "the file is empty")
    elif not _is_text(data, whole=True):
        _refuse_explicit(file, "the file is not UTF-8 text")
        return None
    return data


def _refuse_explicit(file: _File, rule: str) -> bool:
    if file.explicit:
        raise ConfigError(FLAG, str(file.path), rule, WORKS)
    return False


def _unreadable(error: OSError) -> str:
    return f"the file can not be read: {error.strerror}"


def _is_text(data: bytes, whole: bool) -> bool:
    """Whether the bytes are UTF-8 without NUL; not ``whole``: the last character may be cut."""
    if b"\0" in data:
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    # In pieces: a string of a large file would take up to four times its size.
    view = memoryview(data)
    try:
        for start in range(0, len(data), PIECE_BYTES):
            decoder.decode(view[start : start + PIECE_BYTES])
        decoder.decode(b"", final=whole)
    except UnicodeDecodeError:
        return False
    return True


def _no_text(path: str) -> ConfigError:
    if not path:
        rule = "this Python comes without the sources of its standard library, the default data"
        return ConfigError(FLAG, "(none)", rule, WORKS)
    return ConfigError(FLAG, path, "the folder holds no text file", WORKS)


def _near(path: Path) -> str:
    """The sibling with the most similar name, as the answer to a typing mistake."""
    try:
        siblings = os.listdir(path.parent)
    except (OSError, ValueError):
        return WORKS
    matches = difflib.get_close_matches(path.name, siblings, n=1)
    return str(path.parent / matches[0]) if matches else WORKS
