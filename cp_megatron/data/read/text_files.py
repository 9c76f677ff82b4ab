"""Reads text files as documents.

A document is one file: its tokens (by default one per byte), then the end of the document.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.compression import open_unpacked
from cp_megatron.data.read.corpus import Corpus
from cp_megatron.data.read.file_kinds import HEAD_BYTES, binary_kind, in_folder
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

FLAG = "--data-path"
PREPARED = "the .bin/.idx that launch/prepare_data.py makes of it"
WORKS = "a text file in UTF-8, or a folder that holds some"
PROBE_BYTES = 1 << 16
DECODED_BYTES = 1 << 24
MOST_BYTES = 4 << 30
"""The most text that a run reads as bytes when it starts."""
MOST_TOKENISED = 128 << 20
"""The most text that a run tokenises when it starts, which takes about half a minute."""
# Installed packages, tests, and folders generated from tables.
_STDLIB_SKIPPED = frozenset(("site-packages", "dist-packages", "__pycache__", "test", "tests"))
_STDLIB_SKIPPED |= {"idlelib", "lib2to3", "encodings", "pydoc_data"}


def check_text_files(paths: Sequence[str], *, judged: bool = True) -> None:
    """Reads the beginning of the files only, in milliseconds; ``load_text_files`` reads them whole.

    Args:
        paths: files and folders; empty means the sources of Python's standard library.
        judged: refuse a file that is not text. False for files that are read line by line.

    Raises:
        ConfigError: a path is missing, empty or not text, or a folder holds no text file.
    """
    for given, explicit, files in _listing(paths):
        if not any(_read(path, explicit, PROBE_BYTES, judged) for path, _ in files):
            raise _no_text(given)


def load_text_files(paths: Sequence[str], tokenizer: Tokenizer) -> Corpus:
    """Reads and tokenises every document.

    Args:
        paths: files, and folders that are read recursively (see ``walk_files``). Files in a folder
            that are not text are skipped and counted; empty ones are ignored. No path means the
            sources of Python's standard library.
        tokenizer: turns the text into ids.

    Raises:
        ConfigError: as ``check_text_files``, for the whole contents; or there is too much text to
            tokenise when a run starts.
    """
    most = MOST_BYTES if tokenizer.kind == "byte" else MOST_TOKENISED
    documents: list[bytes] = []
    names: list[str] = []
    skipped = size = 0
    for given, explicit, files in _listing(paths):
        before = len(documents)
        for path, name in files:
            data = _read(path, explicit, most + 1)
            if data is None:
                skipped += 1
            elif data:
                documents.append(data)
                names.append(name)
                size += len(data)
                check_size(given, size, most)
        if len(documents) == before:
            raise _no_text(given)
    name = ", ".join(paths) if paths else "the sources of Python's standard library"
    return tokenised(documents, tokenizer, names=names, name=name, skipped=skipped)


def check_size(path: str, size: int, most: int) -> None:
    """Refuses text that would take minutes to tokenise, on every rank.

    Raises:
        ConfigError: ``size`` bytes are more than ``most``.
    """
    if size > most:
        rule = f"is more than the {most >> 20} MiB of text that a run tokenises when it starts"
        raise ConfigError(FLAG, path, rule, PREPARED)


def tokenised(
    documents: Sequence[bytes],
    tokenizer: Tokenizer,
    *,
    names: Sequence[str],
    name: str,
    skipped: int,
) -> Corpus:
    """Makes a corpus of documents, each followed by the end of a document.

    Args:
        documents: at least one text in UTF-8; none is empty.
        tokenizer: turns the text into ids.
        names: the name of each document. They are part of the fingerprint, so that the same files
            have the same fingerprint wherever they lie.
        name: the name of the corpus.
        skipped: files or lines that were left out.
    """
    ids: Iterable[npt.NDArray[np.integer]]
    if tokenizer.kind == "byte":
        ids, dtype = (np.frombuffer(document, dtype=np.uint8) for document in documents), "<u2"
        sizes = [len(document) for document in documents]
    else:
        ids = tokenizer.encode_batch([document.decode("utf-8") for document in documents])
        dtype, sizes = "<i4", [len(each) for each in ids]
    lengths = np.array(sizes, dtype=np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    tokens: npt.NDArray[np.integer] = np.full(int(lengths.sum()), tokenizer.eod, dtype=dtype)
    for start, each in zip(starts.tolist(), ids):
        tokens[start : start + len(each)] = each
    tokens.setflags(write=False)
    return Corpus(
        tokens=tokens,
        document_starts=starts,
        name=name,
        fingerprint=_fingerprint(names, documents),
        skipped=skipped,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
    )


def _fingerprint(names: Sequence[str], documents: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for name, document in zip(names, documents):
        # With both lengths, the end of one document cannot pass for the name of the next.
        label = name.encode("utf-8", errors="surrogateescape")
        digest.update(f"{len(label)} {len(document)} ".encode())
        digest.update(label)
        digest.update(document)
    return digest.hexdigest()


def walk_files(root: str | Path, skipped_folders: frozenset[str] = frozenset()) -> Iterator[str]:
    """The files below a folder by name, the files of a folder before its subfolders.

    Hidden files and folders are left out.
    """
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in skipped_folders
        )
        for name in sorted(files):
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def _listing(paths: Sequence[str]) -> Iterator[tuple[str, bool, Iterator[tuple[Path, str]]]]:
    """Yields (path, whether it is a file, (path, name) of its files) for each path of the user.

    A folder is walked only when it is reached.
    """
    if not paths:
        stdlib = sysconfig.get_path("stdlib")
        sources = (path for path in walk_files(stdlib, _STDLIB_SKIPPED) if path.endswith(".py"))
        # _sysconfigdata is generated and full of the paths of the machine that built Python.
        kept = (path for path in sources if not Path(path).name.startswith("_sysconfigdata"))
        yield "", False, _named(stdlib, kept)
    for given in paths:
        path = Path(given)
        if os.path.isdir(path):
            yield given, False, _named(given, in_folder(list(walk_files(path))).chosen)
        elif os.path.isfile(path):
            yield given, True, iter([(path, path.name)])
        elif os.path.exists(path):
            raise ConfigError(FLAG, given, "must be a regular file or a folder", WORKS)
        else:
            raise ConfigError(FLAG, given, "there is no such file or folder", _near(path))


def _named(root: str, paths: Iterable[str]) -> Iterator[tuple[Path, str]]:
    return ((path, path.relative_to(root).as_posix()) for path in map(Path, paths))


def _read(path: Path, explicit: bool, limit: int = -1, judged: bool = True) -> bytes | None:
    """The first ``limit`` bytes of a file, or None if it cannot be read or is not text.

    An ``explicit`` file, one that the user named, is refused instead, even if it is only empty.
    """
    try:
        with open_unpacked(str(path), FLAG) as stream:
            data = stream.read(limit)
        if not data:
            raise ConfigError(FLAG, str(path), "the file is empty", WORKS)
        kind = binary_kind(str(path), data[:HEAD_BYTES])
        if judged and kind is not None:
            raise ConfigError(FLAG, str(path), f"is {kind[0]}", kind[1])
        if judged and not _is_text(data, whole=len(data) != limit):
            raise ConfigError(FLAG, str(path), "the file is not UTF-8 text", WORKS)
    except ConfigError as error:
        if explicit:
            raise
        return b"" if "is empty" in error.rule else None
    return data


def _is_text(data: bytes, whole: bool) -> bool:
    """Whether the bytes are UTF-8 without NUL. If not ``whole``, the last character may be cut."""
    if b"\0" in data:
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    # In ranges: the string of a large file would take up to four times its size.
    view = memoryview(data)
    try:
        for start in range(0, len(data), DECODED_BYTES):
            decoder.decode(view[start : start + DECODED_BYTES])
        decoder.decode(b"", final=whole)
    except UnicodeDecodeError:
        return False
    return True


def _no_text(path: str) -> ConfigError:
    if not path:
        rule = "this Python lacks the sources of its standard library, which are the default data"
        return ConfigError(FLAG, "(none)", rule, WORKS)
    return ConfigError(FLAG, path, "the folder holds no text file", WORKS)


def _near(path: Path) -> str:
    """Indexed data whose prefix the path begins, or the sibling with the most similar name."""
    if indexed := sorted(path.parent.glob(f"{glob.escape(path.name)}_*_document.idx")):
        return ", or ".join(str(each.with_suffix("")) for each in indexed)
    try:
        siblings = os.listdir(path.parent)
    except (OSError, ValueError):
        return WORKS
    matches = difflib.get_close_matches(path.name, siblings, n=1)
    return str(path.parent / matches[0]) if matches else WORKS
