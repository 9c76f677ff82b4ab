"""The records of a file of conversations.

.jsonl .ndjson .json    an object per line, or one JSON array of objects; also packed
Parquet, Arrow          a row each; what is null in a row is left out, because a table gives
                        every row the keys of all
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cp_megatron.data.read.compression import open_unpacked
from cp_megatron.data.read.file_kinds import FileKind, kind_of
from cp_megatron.data.read.json_lines import BadLineError
from cp_megatron.data.read.records import lines_of, objects_of
from cp_megatron.data.read.tables import read_rows
from cp_megatron.data.read.text_files import FLAG, MOST_TOKENISED, check_size
from cp_megatron.errors import ConfigError

WORKS = "a .jsonl, .json, .parquet or .arrow file with a conversation in each line or row"
PROBE_RECORDS = 8
"""How many records of a file are read before torch is loaded."""
_BATCH = 512

Found = tuple[str, dict[str, Any] | BadLineError]
"""The place of a record, for messages, and the record or the reason why it is malformed."""


def check_chat_file(path: str) -> FileKind:
    """Returns how a file of conversations is read.

    Raises:
        ConfigError: there is no such file, or it is of another kind.
    """
    if not Path(path).is_file():
        if Path(path).is_dir():
            rule, works = "is a folder, and --sft reads files", f"its files, for example {path}/*"
            raise ConfigError(FLAG, path, rule, works)
        raise ConfigError(FLAG, path, "there is no such file", WORKS)
    kind = kind_of(path, FLAG)
    if kind.format not in ("lines", "objects", "parquet", "arrow"):
        raise ConfigError(FLAG, path, f"is read as {kind.format}, which --sft cannot read", WORKS)
    return kind


def read_records(path: str, kind: FileKind, *, probe: bool) -> Iterator[Found]:
    """Yields the records of a file, in order; blank lines are left out.

    Args:
        path: the file.
        kind: how it is read.
        probe: only the first few.

    Raises:
        ConfigError: the file cannot be read, or has more than 128 MiB.
    """
    found = _rows(path, kind, probe) if kind.format in ("parquet", "arrow") else _json(path, kind)
    yield from islice(found, PROBE_RECORDS) if probe else found


def _rows(path: str, kind: FileKind, probe: bool) -> Iterator[Found]:
    if not probe:
        check_size(path, Path(path).stat().st_size, MOST_TOKENISED)
    try:
        rows = read_rows(path, PROBE_RECORDS if probe else _BATCH, arrow=kind.format == "arrow")
        for number, row in enumerate(rows, 1):
            yield f"row {number}", _without_null(row)
    except ConfigError as error:  # its flag is that of prepare_data.py
        raise ConfigError(FLAG, path, error.rule, error.works) from None


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _json(path: str, kind: FileKind) -> Iterator[Found]:
    lines, size = kind.format == "lines", 0
    with open_unpacked(path, FLAG) as stream:
        records = lines_of(stream) if lines else objects_of(stream, path, FLAG)
        for number, (weight, value) in enumerate(records, 1):
            check_size(path, size := size + weight, MOST_TOKENISED)
            if value is not None:
                yield f"{'line' if lines else 'object'} {number}", value
