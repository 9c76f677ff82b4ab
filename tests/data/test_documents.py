"""Documents from every kind of file: the same for all sizes of spans, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.data.read.documents import (
    cut_spans,
    find_inputs,
    lines_before,
    read_span,
)
from cp_megatron.errors import ConfigError

DOCUMENTS = ["one", "zwei €", "", "drei\nlines\n", "four"]


def read(
    *inputs: object, keys: Sequence[str] = ("text",), span_bytes: int = 10, skip: bool = False
) -> tuple[list[list[str]], list[str], int]:
    """The documents of all spans by key, what was skipped, and the number of spans."""
    spans = list(cut_spans(find_inputs([str(each) for each in inputs]), span_bytes=span_bytes))
    columns: list[list[str]] = [[] for _ in keys]
    skipped = []
    for span in spans:
        weight = 0
        for batch in read_span(span, keys, skip_bad_lines=skip):
            weight += batch.weight
            skipped += [reason for _, reason in batch.skipped]
            for column, texts in zip(columns, batch.texts):
                column += texts
        if span.format in ("text", "parquet", "arrow") and not skipped:
            assert weight == pytest.approx(span.weight, abs=2)
    return columns, skipped, len(spans)


def full(documents: Sequence[str] = DOCUMENTS) -> list[str]:
    return [text for text in documents if text]


def json_lines(documents: Sequence[str] = DOCUMENTS) -> bytes:
    return b"".join(json.dumps({"text": text, "n": 1}).encode() + b"\n" for text in documents)


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / "in" / ("sub" if number > 2 else "") / f"{number}.txt").write_text(text)
    (tmp_path / "in" / "bad").write_bytes(b"\xff")
    (tmp_path / "in" / ".hidden").write_text("hidden")
    for size in (1, 12, 1000):
        (texts,), skipped, num_spans = read(tmp_path / "in", span_bytes=size)
        assert texts == full()
        assert skipped == [f"{tmp_path / 'in' / 'bad'}: is not UTF-8 text"]
        assert num_spans == {1: 5, 12: 2, 1000: 1}[size]
    (texts,), _, _ = read(tmp_path / "in" / "*.txt", tmp_path / "in" / "sub" / "4.txt")
    assert texts == ["one", "zwei €", "four"]
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read(tmp_path / "in" / "bad")


@given(
    documents=st.lists(st.text(max_size=5), max_size=8),
    blank=st.integers(0, 8),
    span_bytes=st.integers(1, 60),
    last_newline=st.booleans(),
)
def test_every_line_is_in_one_span(
    documents: list[str],
    blank: int,
    span_bytes: int,
    last_newline: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    documents = [text.encode("utf-8", "replace").decode() for text in documents]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in documents]
    lines.insert(min(blank, len(lines)), b"  ")
    data = b"\n".join(lines) + b"\n" * last_newline
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(data)
    (texts,), _, _ = read(path, span_bytes=span_bytes)
    assert texts == full(documents)
    for place in range(len(data) + 1):
        begun = 0 if place == 0 else data[: place - 1].count(b"\n") + 1
        assert lines_before(str(path), place) == begun


def test_zipped_lines_and_a_mark_of_byte_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json_lines()))
    (tmp_path / "b.json").write_bytes(json_lines(["b"]))
    (texts,), _, _ = read(tmp_path / "a.jsonl.gz", tmp_path / "b.json")
    assert texts == [*full(), "b"]
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "a.jsonl.gz")


def test_several_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "1", "b": "2"}\n{"b": "4", "a": ""}\n')
    columns, _, _ = read(tmp_path / "a.jsonl", keys=("b", "a"))
    assert columns == [["2", "4"], ["1"]]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b'{"text": "a"', "not JSON: Expecting"),
        (b'{"text": "a"} {}', "not JSON: Extra data"),
        (b'["text"]', "not a JSON object"),
        (b'{"txt": "a"}', "has no key 'text'"),
        (b'{"text": 1}', "'text' is not a text"),
        (b'{"text": null}', "'text' is not a text"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 5000, "not JSON: Exceeds"),
    ],
)
def test_bad_lines(line: bytes, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines()[:-1] + b"\n\n" + line + b"\n" + json_lines(["last"]))
    for span_bytes in (7, 10**6):
        with pytest.raises(ConfigError) as caught:
            read(path, span_bytes=span_bytes)
        assert caught.value.value == str(path)
        assert caught.value.rule.startswith("line 7: ")
        assert rule in caught.value.rule
        assert "--skip-bad-lines" in caught.value.works
        (texts,), skipped, _ = read(path, span_bytes=span_bytes, skip=True)
        assert texts == [*full(), "last"]
        assert len(skipped) == 1
        assert rule in skipped[0]


def test_a_link_that_points_nowhere_matches_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a"]))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "missing")
    files = find_inputs([str(tmp_path / "*.jsonl")])
    assert [file.path for file in files] == [str(tmp_path / "a.jsonl")]


def test_a_saved_selection_of_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.arrow").write_bytes(b"")
    state: dict[str, object] = {"_data_files": [{"filename": "data.arrow"}]}
    for selected in (None, [], [{"filename": "indices.arrow"}]):
        state["_indices_data_files"] = selected
        (tmp_path / "state.json").write_text(json.dumps(state))
        if not selected:
            assert len(find_inputs([str(tmp_path)])) == 1
    with pytest.raises(ConfigError, match="selects some of the rows"):
        find_inputs([str(tmp_path)])


def test_a_pair_of_surrogates_is_a_letter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl")[0] == [["\U0001f600"]]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [*DOCUMENTS, None], "n": [1, 2, 3, 4, 5, 6]})
    path = tmp_path / "data" / "a.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    (path.parent / "README.md").write_text("not a document where there is data")
    for given_path in (path, path.parent):
        (texts,), _, num_spans = read(given_path)
        assert (texts, num_spans) == (full(), 3)
    with pytest.raises(ConfigError, match="is no column of") as caught:
        read(path, keys=("words",))
    assert (caught.value.flag, caught.value.works) == ("--json-keys", "--json-keys text")
    with pytest.raises(ConfigError, match="that holds int64"):
        read(path, keys=("n",))
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(ConfigError, match="cannot be read as a table"):
        read(path)


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [*DOCUMENTS, None, "last"]})
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    for span_bytes in (1, 10**6):
        (texts,), _, num_spans = read(tmp_path / "one", span_bytes=span_bytes)
        assert texts == [*full(), "last"]
        assert num_spans == 2
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    splits.save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ConfigError, match="holds 2 splits") as caught:
        read(tmp_path / "two")
    assert str(tmp_path / "two" / "train") in caught.value.works
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(ConfigError, match="which is missing"):
        read(tmp_path / "one")


def test_refused_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given_path, rule in (
        (tmp_path / "none", "no such file"),
        (tmp_path / "*.txt", "matches no file"),
        (tmp_path, "holds nothing"),
        ("/dev/null", "regular file"),
        ("a\0b", "no such file"),
    ):
        with pytest.raises(ConfigError, match=rule):
            read(given_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="package pyarrow") as caught:
        read(tmp_path / "a.parquet")
    assert caught.value.works == "pip install 'cp_megatron[data]'"
