"""Every kind of file that people bring as a corpus: the tokens that are read, or what is told."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cp_megatron.config import DataConfig
from cp_megatron.data.prepare.prepare import prepare
from cp_megatron.data.prepare.request import Request
from cp_megatron.data.read import document_corpus, records
from cp_megatron.data.read.indexed import IndexedDataset
from cp_megatron.data.rows.corpora import check_data, open_data, open_single
from cp_megatron.errors import ConfigError

TEXTS = ["The first text, with a comma.", 'zwei "€"\nlines\r\nof it', "x" * 30, "the\tlast"]
ROWS = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
TOKENS = [token for text in TEXTS for token in (*text.encode(), 256)]
PLAIN = "A plain text.\nOf two lines.\n"


def lines(rows: list[dict[str, str]] = ROWS) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def table(delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def zstd(data: bytes) -> bytes:
    module = pytest.importorskip("zstandard")
    half = len(data) // 2
    return b"".join(module.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


def pyarrow_file(kind: str) -> bytes:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    rows, stream = pyarrow.Table.from_pylist(ROWS), io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(rows, stream, row_group_size=2)
    elif kind == "feather":
        pyarrow.feather.write_feather(rows, stream, chunksize=3)
    else:
        new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with new(stream, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=3)
    return stream.getvalue()


MARK = b"\xef\xbb\xbf"
READ: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "a.json": lines,
    "mark.jsonl": lambda: MARK + lines(),
    "crlf.jsonl": lambda: lines().replace(b"\n", b"\r\n"),
    "array.json": lambda: json.dumps(ROWS).encode(),
    "array.jsonl": lambda: json.dumps(ROWS).encode(),
    "pretty.json": lambda: MARK + json.dumps(ROWS, indent=2).encode(),
    "objects.json": lambda: "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "a.jsonl.gz": lambda: gzip.compress(lines()),
    "two.jsonl.gz": lambda: gzip.compress(lines(ROWS[:2])) + gzip.compress(lines(ROWS[2:])),
    "a.ndjson.gz": lambda: gzip.compress(lines()),
    "a.jsonl.bz2": lambda: bz2.compress(lines()),
    "a.jsonl.xz": lambda: lzma.compress(lines()),
    "a.jsonl.zst": lambda: zstd(lines()),
    "array.json.zst": lambda: zstd(json.dumps(ROWS).encode()),
    "lies.jsonl": lambda: gzip.compress(lines()),
    "lies.jsonl.gz": lines,
    "a.csv": lambda: table(","),
    "mark.csv": lambda: MARK + table(","),
    "a.tsv": lambda: table("\t"),
    "a.csv.gz": lambda: gzip.compress(table(",")),
    "a.parquet": lambda: pyarrow_file("parquet"),
    "lies.txt": lambda: pyarrow_file("parquet"),
    "a.arrow": lambda: pyarrow_file("file"),
    "stream.arrow": lambda: pyarrow_file("stream"),
    "a.feather": lambda: pyarrow_file("feather"),
}
TEXT: dict[str, Callable[[], bytes]] = {
    "a.txt": PLAIN.encode,
    "a.txt.gz": lambda: gzip.compress(PLAIN.encode()),
    "a.txt.bz2": lambda: bz2.compress(PLAIN.encode()),
    "a.md.xz": lambda: lzma.compress(PLAIN.encode()),
    "a.zst": lambda: zstd(PLAIN.encode()),
    "a": PLAIN.encode,
}


def prepared(folder: Path, path: Path, **changes: object) -> list[int]:
    """The ids that prepare_data makes of a file."""
    values: dict[str, object] = {"input": (str(path),), "output_prefix": str(folder / "out")}
    (prefix,) = prepare(Request(**{**values, "workers": 1, **changes})).outputs  # type: ignore[arg-type]
    ids: list[int] = IndexedDataset.open(prefix).tokens.tolist()
    return ids


def config(path: Path, **changes: object) -> DataConfig:
    return DataConfig(data_path=(str(path),), seq_length=8, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", READ)
def test_the_texts_of_data_are_read_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK", 16)  # an object lies across many reads
    (tmp_path / name).write_bytes(READ[name]())
    assert check_data(config(tmp_path / name)) == ()
    assert open_single(config(tmp_path / name)).tokens.tolist() == TOKENS


@pytest.mark.parametrize("name", ["array.json", "a.jsonl.zst", "a.csv", "a.feather", "a.ndjson"])
def test_prepare_data_reads_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(READ[name]())
    assert prepared(tmp_path, tmp_path / name) == TOKENS


@pytest.mark.parametrize("name", TEXT)
def test_text_is_one_document(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(TEXT[name]())
    assert check_data(config(tmp_path / name)) == ()
    assert open_single(config(tmp_path / name)).tokens.tolist() == [*PLAIN.encode(), 256]
    if name != "a":
        assert prepared(tmp_path, tmp_path / name) == [*PLAIN.encode(), 256]


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"text"))
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "text")
    return stream.getvalue()


def checked_and_read(data: DataConfig) -> None:
    check_data(data)
    open_data(data, seed=0)


WARC = b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nSome text of a page.\r\n"
REFUSED: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "a.warc": (lambda: WARC, "web archive", "trafilatura"),
    "a.warc.gz": (lambda: gzip.compress(WARC), "web archive", "trafilatura"),
    "a.wet": (lambda: WARC, "web archive", "trafilatura"),
    "lies.txt": (lambda: WARC, "web archive", "trafilatura"),
    "a.pdf": (lambda: b"%PDF-1.7\n%\xe2\xe3", "a PDF", "pdftotext"),
    "a.docx": (zipped, "a ZIP archive", "text files in it"),
    "a.tar": (tar, "a tar archive", "tar -xf"),
    "a.tar.gz": (lambda: gzip.compress(tar()), "a tar archive", "tar -xf"),
    "a.utf16.txt": (lambda: PLAIN.encode("utf-16"), "UTF-16", "iconv"),
    "a.parquet.gz": (lambda: gzip.compress(pyarrow_file("parquet")), "packed by gzip", "unpacked"),
    "a.idx": (lambda: b"MMIDIDX\0\0", "there is no such file", "PREFIX"),
    "cut.jsonl.gz": (lambda: gzip.compress(lines())[:-9], "cannot be read", "complete"),
    "cut.jsonl.zst": (lambda: zstd(lines())[:-3], "inside a frame", "complete"),
    "damaged.txt.xz": (lambda: lzma.compress(b"a" * 99)[:40], "cannot be read", "complete"),
    "empty.jsonl": (lambda: b"", "is empty", ""),
    "cut.json": (lambda: json.dumps(ROWS).encode()[:-1], "the array has no end", "one array"),
    "broken.json": (lambda: b'[{"text": "a"}, {"text" "b"}]', "object 2: not JSON", "one array"),
    "other.json": (lambda: b'[{"text": "a"}, 3]', "object 2: not a JSON object", "--skip-bad"),
    "quote.csv": (lambda: b'text\n"a\nb\n', "is not a row of the table", "quote"),
    "cells.csv": (lambda: b"id,text\n1,a\n2\n", "row 2: a row of 1 cells", "--skip-bad-lines"),
    "latin.csv": (lambda: "text\né\n".encode("latin-1"), "not UTF-8", "iconv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, rule, works = REFUSED[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(ConfigError) as caught:
        checked_and_read(config(tmp_path / name))
    assert rule in caught.value.rule
    assert works in caught.value.works
    assert caught.value.flag == "--data-path"
    if name not in ("a.idx", "empty.jsonl"):
        with pytest.raises(ConfigError) as caught:
            prepared(tmp_path, tmp_path / name)
        assert rule in caught.value.rule
        assert caught.value.flag == "--input"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.ndjson.gz"])
def test_another_key_is_answered_by_a_whole_command(name: str, tmp_path: Path) -> None:
    data = READ[name]()
    plain = gzip.decompress(data) if name.endswith(".gz") else data
    if name == "a.parquet":
        import pyarrow
        import pyarrow.parquet

        rows = pyarrow.Table.from_pylist(ROWS).rename_columns(["id", "content"])
        pyarrow.parquet.write_table(rows, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(plain.replace(b"text", b"content", 99))
    chosen = {"tokenizer_type": "huggingface", "tokenizer_model": "some model"}
    with pytest.raises(ConfigError) as caught:
        check_data(config(tmp_path / name, **chosen))
    works = caught.value.works
    begin = f"python launch/prepare_data.py --input {tmp_path / name} --output-prefix {tmp_path}/a "
    assert works.startswith(begin + "--tokenizer-type huggingface --tokenizer-model 'some model'")
    assert "--json-keys" in works
    assert "content" in works
    assert "--skip-bad-lines" not in works
    assert (caught.value.flag, caught.value.value) == ("--data-path", str(tmp_path / name))
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, tmp_path / name)
    assert "content" in caught.value.works
    assert "--skip-bad-lines" not in caught.value.works
    ids = prepared(tmp_path, tmp_path / name, json_keys=("content",))
    assert len(ids) >= len(TOKENS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_conversations_are_answered_by_sft(name: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path, row = tmp_path / name, {"messages": [{"role": "user", "content": "x"}], "id": 3}
    path.write_text(json.dumps(row))
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    for read in (lambda: check_data(config(path)), lambda: prepared(tmp_path, path)):
        with pytest.raises(ConfigError) as caught:
            read()
        assert caught.value.works == "pretrain.py --sft, which trains on conversations"


def test_a_later_line_without_the_key_is_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines() + b'{"content": "x"}\n')
    with pytest.raises(ConfigError, match="line 5: has no key 'text', but 'content'") as caught:
        check_data(config(path))
    assert "--skip-bad-lines" in caught.value.works
    assert open_single(config(path, skip_bad_lines=True)).tokens.tolist() == TOKENS


def test_a_text_that_looks_like_data_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(lines())
    (note,) = check_data(config(tmp_path / "a.txt"))
    assert "lines are JSON" in note
    (tmp_path / "b.html").write_text("<!DOCTYPE html><p>a")
    (note,) = check_data(config(tmp_path / "b.html"))
    assert "is HTML" in note
    for text in ("ORCHIDS are flowers", "BZh is no packing", "{a} text", "PAR1 is a level"):
        (tmp_path / "c.txt").write_text(text)
        assert check_data(config(tmp_path / "c.txt")) == ()


def test_a_folder_of_data_is_read_as_data(tmp_path: Path) -> None:
    """Files that describe the data are left out; other text is left out with a note."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "sub").mkdir()
    (folder / "a.ndjson.zst").write_bytes(zstd(lines(ROWS[:1])))
    (folder / "sub" / "b.parquet").write_bytes(pyarrow_file("parquet"))
    (folder / "README.md").write_text("About the data.")
    assert check_data(config(folder)) == ()
    wanted = [*TEXTS[0].encode(), 256, *TOKENS]
    assert open_single(config(folder)).tokens.tolist() == wanted
    (folder / "more.txt").write_text("text")
    (note,) = check_data(config(folder))
    assert note == f"{folder}: 1 files are not read: more.txt"
    assert prepared(tmp_path, folder) == wanted


def test_tables_in_a_folder_of_text_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(PLAIN)
    (folder / "b.csv").write_bytes(table(","))
    (folder / "c.warc").write_bytes(WARC)
    (folder / "d.pdf").write_bytes(b"%PDF-1.7\n")
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"packed"))
    wanted = [*PLAIN.encode(), 256, *b"packed", 256]
    data = open_data(config(folder, split="1"), seed=0)
    assert any("2 files are not text" in note for note in data.notes)
    assert f"{folder}: 1 files are not read: b.csv" in check_data(config(folder))
    assert open_single(config(folder)).tokens.tolist() == wanted
    assert prepared(tmp_path, folder) == wanted
    (folder / "a.txt").unlink()
    (folder / "e.txt.gz").unlink()
    for name in ("c.warc", "d.pdf"):
        (folder / name).unlink()
    assert open_single(config(folder)).tokens.tolist() == TOKENS


def test_the_prefix_of_indexed_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    prepared(tmp_path, tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="no such file") as caught:
        check_data(config(tmp_path / "out"))
    assert caught.value.works == str(tmp_path / "out_text_document")
    assert open_single(config(tmp_path / "out_text_document")).tokens.tolist() == TOKENS


def test_without_its_package_zstandard_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines()))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match="packed by Zstandard") as caught:
        check_data(config(tmp_path / "a.jsonl.zst"))
    assert "pip install 'cp_megatron[data]'" in caught.value.works


def test_too_much_for_the_start_of_a_run_is_answered_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_corpus, "MOST_TOKENISED", 50)
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        (tmp_path / name).write_bytes(READ[name]())
        with pytest.raises(ConfigError, match="than the 0 MiB of text") as caught:
            checked_and_read(config(tmp_path / name))
        begin = f"python launch/prepare_data.py --input {tmp_path / name} --output-prefix"
        assert caught.value.works == f"{begin} {tmp_path}/a"
