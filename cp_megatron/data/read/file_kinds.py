"""What a file of documents holds, by its content and then by its name.

    a JSON object per line    .jsonl .ndjson .json, also packed (``compression.py``)
    JSON objects otherwise    the same names: one array, or objects that take several lines
    a table of text           .csv, .tsv, also packed
    a table                   Parquet, and Arrow's files and streams (Feather)
    text                      any other UTF-8

What is none of these has a name of its own, so that the user learns what to do with it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cp_megatron.data.read.compression import Codec, codec_of, name_unpacked, open_unpacked
from cp_megatron.errors import ConfigError

Format = Literal["text", "lines", "objects", "csv", "tsv", "parquet", "arrow"]
HEAD_BYTES = 1 << 16
"""How much of a file is read to learn what it holds."""
TABLES: frozenset[Format] = frozenset({"csv", "tsv", "parquet", "arrow"})

_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
_ARCHIVES = (".warc", ".wet", ".wat")
_ARCHIVE = (
    "a web archive (WARC), whose pages have headers and HTML tags",
    "the text that a tool such as trafilatura extracts from it, as .jsonl",
)
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BINARY: Sequence[tuple[int, bytes | tuple[bytes, ...], str, str]] = (
    (0, b"WARC/", *_ARCHIVE),
    (0, b"%PDF-", "a PDF", "its text: pdftotext FILE"),
    (0, b"{\\rtf", "a rich text document", "its text, exported as .txt"),
    (0, b"PK\x03\x04", "a ZIP archive (so are .docx, .xlsx, .epub)", "the text files in it"),
    (257, (b"ustar\0", b"ustar  \0"), "a tar archive", "the files in it: tar -xf FILE"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "the files in it"),
    (0, b"Rar!\x1a", "a RAR archive", "the files in it"),
    (0, b"\xd0\xcf\x11\xe0", "a document of Microsoft Office", "its text, exported as .txt"),
    (0, b"SQLite format 3\0", "an SQLite database", "a table of it: sqlite3 -header -csv"),
    (0, b"\x89HDF\r\n", "an HDF5 file", "its text as .jsonl"),
    (0, b"\x93NUMPY", "a NumPy array", "text, or ids as .bin/.idx (prepare_data.py)"),
    (0, b"Obj\x01", "an Avro file", "its rows as Parquet or .jsonl"),
    (0, b"ORC", "an ORC file", "its rows as Parquet or .jsonl"),
    (0, b"FEA1", "a Feather file of version 1", "pyarrow.feather.write_feather, which writes 2"),
    (0, b"MMIDIDX\0\0", "the index of a .bin/.idx pair", "--data-path with the path without .idx"),
    (0, b"GGUF", "a GGUF model", "text"),
    (0, _PICKLES, "a pickle", "text; a pickle is a program and is never run"),
    (0, (b"\x89PNG", b"\xff\xd8\xff"), "an image", "text"),
    (0, _UTF16, "UTF-16, so it is not UTF-8 text", "iconv -f UTF-16 -t UTF-8 FILE"),
)
"""Where the bytes are that tell a format, the bytes, its name, and what works instead."""


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """What a file holds.

    Attributes:
        format: how it is read.
        packed: how it is packed.
        note: why the user may not want it read so; empty if there is nothing to say.
    """

    format: Format
    packed: Codec | None = None
    note: str = ""


def kind_of(path: str, flag: str) -> FileKind:
    """Reads the beginning of a regular file that the user named.

    Args:
        path: the file.
        flag: the flag that named it, for messages.

    Raises:
        ConfigError: the file cannot be read, or holds nothing that a run can train on.
    """
    with open_unpacked(path, flag) as stream:
        head = stream.read(HEAD_BYTES)
    packed = codec_of(path)
    if (other := binary_kind(path, head)) is not None:
        raise ConfigError(flag, path, f"is {other[0]}", other[1])
    format_ = format_of_name(path)
    if head.startswith(b"PAR1") and b"\0" in head:
        format_ = "parquet"
    elif head.startswith((b"ARROW1\0", b"\xff\xff\xff\xff")):
        format_ = "arrow"
    if format_ in ("parquet", "arrow") and packed is not None:
        raise ConfigError(flag, path, f"is a table packed by {packed}", "the file unpacked")
    if format_ == "lines" and _spans_lines(path, head):
        format_ = "objects"
    note = _doubt(path, head) if format_ == "text" else ""
    return FileKind(format=format_, packed=packed, note=note)


def format_of_name(path: str) -> Format:
    """The format that the name of a file tells."""
    name = name_unpacked(path)
    if name.endswith((*_LINES, ".json")):
        return "lines"
    endings: dict[str, Format] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
    endings |= dict.fromkeys((".arrow", ".feather"), "arrow")
    return next((kind for end, kind in endings.items() if name.endswith(end)), "text")


def binary_kind(path: str, head: bytes) -> tuple[str, str] | None:
    """(name, what works instead) of a file that no run trains on; None if it may be one."""
    if name_unpacked(path).endswith(_ARCHIVES):
        return _ARCHIVE
    row = next((row for row in _BINARY if head[row[0] :].startswith(row[1])), None)
    # A text may begin with the letters ORC.
    if row is None or (row[1] in (b"ORC", b"GGUF") and b"\0" not in head):
        return None
    return row[2:]


class Listing(NamedTuple):
    """The files of a folder that are read, whether they hold data, and the files left out."""

    chosen: list[str]
    data: bool
    left_out: list[str]


def in_folder(paths: Sequence[str]) -> Listing:
    """Chooses the files to read in a folder: those with data, or else those with text.

    .json and tables of text also lie beside sources and articles, so they count as data only where
    there is no text. Beside text, .json is read as text, and tables of text are not read.
    """
    formats = {path: format_of_name(path) for path in paths}
    data = [path for path in paths if formats[path] != "text"]
    certain = [path for path in data if _is_certain(path, formats[path])]
    if not certain and any(formats[path] == "text" and not _is_about(path) for path in paths):
        chosen, data = [path for path in paths if formats[path] not in TABLES], []
    else:
        chosen = certain or data or list(paths)
    kept = set(chosen)
    left_out = [path for path in paths if path not in kept and not _is_about(path)]
    return Listing(chosen, bool(data), left_out)


def _is_certain(path: str, kind: Format) -> bool:
    """Whether a file of this name holds documents and nothing else."""
    return kind in ("parquet", "arrow") or (kind == "lines" and not path.lower().endswith(".json"))


def _is_about(path: str) -> bool:
    """Whether the file describes the others of its folder."""
    stem = path.replace("\\", "/").rpartition("/")[2].partition(".")[0].lower()
    return stem in ("readme", "license", "licence", "dataset_infos", "checksums", "sha256sums")


def _spans_lines(path: str, head: bytes) -> bool:
    """Whether a file holds one array, or objects that take several lines each."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    first, newline, _ = text.partition(b"\n")
    if text[:1] == b"[":
        return True
    if text[:1] != b"{" or not newline or not name_unpacked(path).endswith(".json"):
        return False
    return not _is_json(first)


def _doubt(path: str, head: bytes) -> str:
    """What the user should know about a text that looks like data."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    first = text.partition(b"\n")[0]
    if text[:1] == b"{" and _is_json(first):
        return f"{path} is read as text, but its lines are JSON; name it .jsonl to read their text"
    if text[:15].lower().startswith((b"<!doctype html", b"<html")):
        return f"{path} is HTML, and its tags are trained on like the text"
    return ""


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
