"""Reads tables of documents with ``pyarrow``: Parquet, Arrow, and saved Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from cp_megatron.data.read.json_lines import KEYS_FLAG, instead_of_key
from cp_megatron.errors import ConfigError

FLAG = "--input"
SAVED_DATASET = "state.json"
"""The file that ``Dataset.save_to_disk`` writes into a folder."""
SAVED_DATASETS = "dataset_dict.json"
"""The file that ``DatasetDict.save_to_disk`` writes into a folder."""
_BATCH = 512
_ARROW_FILE = b"ARROW1"
"""How Arrow's files begin, those of Feather included; its streams begin otherwise."""

TableRows = tuple[tuple[list[str | None], ...], float]
"""The texts of each key, None for a cell without a value, and the share of the requested rows that
have been read, 0 to 1."""


def row_groups(path: str) -> list[tuple[int, int]]:
    """(number, bytes) of each row group of a Parquet file.

    Raises:
        ConfigError: it is not a Parquet file, or pyarrow is missing.
    """
    with _pyarrow(path) as (_, parquet), parquet.ParquetFile(path) as table:
        groups = [table.metadata.row_group(n) for n in range(table.metadata.num_row_groups)]
        return [
            (number, sum(group.column(n).total_compressed_size for n in range(group.num_columns)))
            for number, group in enumerate(groups)
        ]


def read_row_group(path: str, start: int, stop: int, keys: Sequence[str]) -> Iterator[TableRows]:
    """Yields the rows of the row groups [start, stop).

    Raises:
        ConfigError: a key is not a column of texts, or the file is damaged.
    """
    with _pyarrow(path) as (arrow, parquet), parquet.ParquetFile(path) as table:
        _check_columns(arrow, path, table.schema_arrow, keys)
        groups = list(range(start, stop))
        total = sum(table.metadata.row_group(number).num_rows for number in groups)
        for batch in table.iter_batches(_BATCH, row_groups=groups, columns=list(keys)):
            yield _rows(batch, keys, total)


def read_rows(path: str, batch: int, *, arrow: bool) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Parquet or Arrow file with all their columns.

    Args:
        path: the file.
        batch: rows of Parquet that are read at a time.
        arrow: whether the file is an Arrow file.

    Raises:
        ConfigError: it is not such a file, or pyarrow is missing.
    """
    if arrow:
        for rows in _record_batches(path):
            yield from rows.to_pylist()
        return
    with _pyarrow(path) as (_, parquet), parquet.ParquetFile(path) as table:
        for rows in table.iter_batches(batch):
            yield from rows.to_pylist()


def arrow_runs(path: str, piece_bytes: int) -> list[tuple[int, int, int]]:
    """Cuts an Arrow stream or file into runs of record batches: (first, one after the last, bytes).

    Raises:
        ConfigError: it is not an Arrow file, or pyarrow is missing.
    """
    runs: list[tuple[int, int, int]] = []
    start = size = number = 0
    for number, batch in enumerate(_record_batches(path), 1):
        size += batch.nbytes
        if size >= piece_bytes:
            runs.append((start, number, size))
            start, size = number, 0
    return runs + ([(start, number, size)] if number > start else [])


def read_arrow(path: str, start: int, stop: int, keys: Sequence[str]) -> Iterator[TableRows]:
    """Yields the rows of the record batches [start, stop).

    Raises:
        ConfigError: a key is not a column of texts, or the file is damaged.
    """
    with _pyarrow(path) as (arrow, _):
        for batch in islice(_record_batches(path), start, stop):
            _check_columns(arrow, path, batch.schema, keys)
            for place in range(0, batch.num_rows, _BATCH):
                yield _rows(batch.slice(place, _BATCH), keys, batch.num_rows * (stop - start))


def _record_batches(path: str) -> Iterator[Any]:
    """The batches of an Arrow stream or file, mapped: only what is used is read from the disk."""
    with _pyarrow(path) as (arrow, _), arrow.memory_map(path) as file:
        if file.read(len(_ARROW_FILE)) == _ARROW_FILE:
            with arrow.ipc.open_file(file) as batches:
                yield from map(batches.get_batch, range(batches.num_record_batches))
            return
        file.seek(0)
        with arrow.ipc.open_stream(file) as stream:
            yield from stream


def _rows(batch: Any, keys: Sequence[str], total: int) -> TableRows:
    columns = tuple(batch.column(batch.schema.get_field_index(key)).to_pylist() for key in keys)
    return columns, batch.num_rows / max(1, total)


def _check_columns(arrow: Any, path: str, schema: Any, keys: Sequence[str]) -> None:
    text = (arrow.string(), arrow.large_string(), arrow.string_view())
    texts = [column.name for column in schema if column.type in text]
    for key in keys:
        if key not in texts:
            rule = f"is no column of {path}"
            if key in schema.names:
                rule = f"is a column of {path} that holds {schema.field(key).type}, not text"
            raise ConfigError(KEYS_FLAG, key, rule, instead_of_key(texts, schema.names))


@contextmanager
def _pyarrow(path: str) -> Iterator[tuple[Any, Any]]:
    """pyarrow and its Parquet module; their errors become those of the file."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        rule = "needs the package pyarrow, which is not installed"
        raise ConfigError(FLAG, path, rule, "pip install 'cp_megatron[data]'") from None
    try:
        yield pyarrow, pyarrow.parquet
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        rule = f"cannot be read as a table: {' '.join(str(error).split())}"
        raise ConfigError(FLAG, path, rule, "a complete file") from None
