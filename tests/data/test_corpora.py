"""From paths to rows: datasets, weights, parts, fingerprints, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cp_megatron.config import DataConfig
from cp_megatron.data.rows.corpora import check_data, open_data, open_single
from cp_megatron.data.rows.dataset_paths import parse_datasets
from cp_megatron.data.rows.sampler import IGNORED, RowSource
from cp_megatron.errors import ConfigError
from tests.data.ranges import write_pair

EOD = 256


def indexed(prefix: Path, lengths: list[int], *, first: int = 0, eod: bool = True) -> str:
    """A pair whose tokens count up modulo 200, with or without the ends of documents."""
    documents = []
    for length in lengths:
        documents.append((np.arange(first, first + length) % 200).tolist() + [EOD] * eod)
        first += length
    write_pair(prefix, documents)
    return str(prefix)


def config(*paths: str, seq_length: int = 16, **changes: object) -> DataConfig:
    data = DataConfig(data_path=paths, seq_length=seq_length, split="8,1,1")
    return replace(data, **changes)  # type: ignore[arg-type]


def refused(data: DataConfig) -> ConfigError:
    try:
        check_data(data)
    except ConfigError as error:
        return error
    with pytest.raises(ConfigError) as caught:
        open_data(data, seed=0)
    return caught.value


def text(path: Path, contents: str) -> str:
    path.write_text(contents)
    return str(path)


def tokens_of(rows: RowSource | None) -> list[list[int]]:
    assert rows is not None
    return [rows[number].inputs.tolist() for number in range(rows.rows_per_epoch)]


def test_words_are_paths_or_weights_before_paths(tmp_path: Path) -> None:
    pair = indexed(tmp_path / "a", [5])
    for word in (pair, f"{pair}.bin", f"{pair}.idx"):
        assert [spec.kind for spec in parse_datasets([word])] == ["indexed"]
    assert [spec.kind for spec in parse_datasets(["x.txt", "folder"])] == ["text"]
    assert [spec.kind for spec in parse_datasets(["x.txt", "y.jsonl"])] == ["text", "json"]
    weights = [spec.weight for spec in parse_datasets(["0.7", "x", "3e-1", "y"])]
    assert weights == [Fraction(7, 10), Fraction(3, 10)]
    for words in (["0.7", "x", "y"], ["0.7", "x", "y", "z"], ["0", "x"], ["x", "1"], ["1", "2"]):
        with pytest.raises(ConfigError) as caught:
            parse_datasets(words)
        assert caught.value.flag == "--data-path"


def test_indexed_data_gives_the_rows_of_the_same_text(tmp_path: Path) -> None:
    words = ["three blind mice", "see how they run", "they all ran after the farmer's wife"] * 4
    folder = tmp_path / "text"
    folder.mkdir()
    for number, document in enumerate(words):
        text(folder / f"{number:02}.txt", document)
    write_pair(tmp_path / "pair", ([*document.encode(), EOD] for document in words))
    lines = text(tmp_path / "t.jsonl", "\n".join(f'{{"text": "{line}"}}' for line in words))
    one, *others = [
        open_data(config(path), seed=3) for path in (str(folder), str(tmp_path / "pair"), lines)
    ]
    for other in others:
        for part in ("train", "valid", "test"):
            expected, found = getattr(one.rows, part), getattr(other.rows, part)
            assert tokens_of(found) == tokens_of(expected)
            assert found[0].document_lengths == expected[0].document_lengths
            assert found[0].crossing.tolist() == expected[0].crossing.tolist()
    assert len({data.fingerprint for data in (one, *others)}) == 3


def test_documents_follow_the_index_not_their_last_token(tmp_path: Path) -> None:
    pair = indexed(tmp_path / "a", [10, 1, 30, 60], eod=False)
    corpus = open_single(config(pair))
    assert corpus.document_starts.tolist() == [0, 10, 11, 41]
    assert isinstance(corpus.tokens, np.memmap)


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_no_token_is_in_two_parts(tmp_path: Path, packing: str) -> None:
    write_pair(tmp_path / "a", ([n * 3, n * 3 + 1, n * 3 + 2] for n in range(80)))
    data = config(str(tmp_path / "a"), packing=packing, seq_length=9, split="1,1,1")
    rows = open_data(data, seed=0).rows
    seen: list[set[int]] = []
    for part in (rows.train, rows.valid, rows.test):
        assert part is not None
        several = [part[number] for number in range(part.rows_per_epoch)]
        tokens = {int(t) for row in several for t in (*row.inputs, *row.labels)}
        seen.append(tokens - {EOD, IGNORED})
    assert sum(len(part) for part in seen) == len(set.union(*seen)) > 200
    if packing == "best-fit":
        assert all(len({token // 3 for token in part}) * 3 == len(part) for part in seen)


def test_parts_without_weight_or_tokens_are_left_out(tmp_path: Path) -> None:
    parts = open_data(config(indexed(tmp_path / "a", [2999]), split="9,1"), seed=5).rows
    assert parts.valid is not None
    assert parts.test is None
    tight = open_data(config(indexed(tmp_path / "b", [19]), seq_length=12), seed=5).rows
    assert tight.valid is None
    assert tight.test is None


def test_training_shorter_than_a_row_is_refused_with_what_fits(tmp_path: Path) -> None:
    pair = indexed(tmp_path / "a", [99])
    error = refused(config(pair, seq_length=100, split="1"))
    assert error.flag == "--seq-length"
    assert error.works.startswith("--seq-length up to 99")
    assert open_data(config(pair, seq_length=99, split="1"), seed=5).rows.train[0]


def test_parts_may_have_paths_of_their_own(tmp_path: Path) -> None:
    train, valid = indexed(tmp_path / "a", [99]), indexed(tmp_path / "b", [50], first=120)
    data = DataConfig(train_data_path=(train,), valid_data_path=(valid,), seq_length=16)
    check_data(data)
    rows = open_data(data, seed=0).rows
    assert {token for row in tokens_of(rows.train) for token in row} == set(range(96))
    assert tokens_of(rows.valid)[0] == list(range(120, 136))
    assert rows.test is None
    missing = replace(data, valid_data_path=(str(tmp_path / "c.idx"),))
    assert refused(missing).flag == "--valid-data-path"
    short = replace(data, valid_data_path=(indexed(tmp_path / "d", [9]),))
    assert "not a single row of 16" in refused(short).rule


def test_a_blend_takes_its_shares(tmp_path: Path) -> None:
    low, high = indexed(tmp_path / "a", [990]), indexed(tmp_path / "b", [990])
    rows = open_data(config("3", low, "1", high), seed=0).rows
    sources = [rows.train.pattern.find(number)[0] for number in range(40)]  # type: ignore[attr-defined]
    assert sources.count(0) == 30
    assert rows.valid is not None


def test_the_fingerprint_depends_on_all_that_decides_rows(tmp_path: Path) -> None:
    a, b = indexed(tmp_path / "a", [200] * 4), indexed(tmp_path / "b", [150] * 4)
    plain = config("1", a, "1", b)
    others = [
        config("1", b, "1", a),
        config("1", a, "2", b),
        config(a, b),
        config(a),
        replace(plain, packing="best-fit"),
        DataConfig(train_data_path=(a,), valid_data_path=(b,), seq_length=16),
    ]
    found = {open_data(data, seed=0).fingerprint for data in (plain, *others)}
    assert len(found) == 1 + len(others)
    assert open_data(plain, seed=1).fingerprint == open_data(plain, seed=0).fingerprint


def test_ids_beyond_the_vocabulary_are_refused_at_open(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[*range(100), 4321]], vocab_size=5000)
    error = refused(config(str(tmp_path / "a")))
    assert "4321" in error.rule
    assert "100" in error.rule


def test_a_bad_line_is_refused_or_counted(tmp_path: Path) -> None:
    good = '{"text": "three blind mice see how they run after the wife of the farmer"}'
    lines = [good, "", "{", '{"text": 3}', "[]", '{"text": "\\ud800"}', good]
    path = text(tmp_path / "t.jsonl", "\n".join(lines))
    for read in (check_data, lambda data: open_data(data, seed=0)):
        with pytest.raises(ConfigError) as caught:
            read(config(path))
        assert (caught.value.flag, caught.value.value) == ("--data-path", path)
        assert caught.value.rule.startswith("line 3: not JSON")
    data = open_data(config(path, skip_bad_lines=True), seed=0)
    assert data.notes == (f"{path}: 4 malformed lines left out",)
    assert refused(config(str(tmp_path / "t.txt"))).flag == "--data-path"
    other = text(tmp_path / "t.txt", good)
    assert refused(config(other, skip_bad_lines=True)).flag == "--skip-bad-lines"
    assert refused(config(other, sft=True)).works.startswith("a .jsonl, .json, ")


def test_packing_reports_its_padding(tmp_path: Path) -> None:
    pair = indexed(tmp_path / "a", [15] * 10)
    data = open_data(config(pair, packing="best-fit", split="1"), seed=0)
    assert data.notes == ("10 packed rows of whole documents, 0.00% padding",)


def test_a_line_is_read_as_prepare_data_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\n' + '{"text": "second"}'.encode("utf-16"))
    error = refused(config(str(path), seq_length=2))
    assert error.rule.startswith("line 2: not UTF-8")
    data = config(str(path), seq_length=2, skip_bad_lines=True)
    assert open_single(data).tokens.tolist() == [*b"first", EOD]


def test_of_several_datasets_the_one_that_is_too_short_is_named(tmp_path: Path) -> None:
    long, short = indexed(tmp_path / "long", [99]), indexed(tmp_path / "short", [3])
    for words in ((long, short), ("0.5", long, "0.5", short)):
        error = refused(config(*words))
        assert error.flag == "--seq-length"
        assert error.rule.startswith(f"{short}: a row needs 17 tokens")


def test_a_split_that_leaves_nothing_is_refused_or_reported(tmp_path: Path) -> None:
    one = indexed(tmp_path / "one", [99])
    error = refused(config(one, split="1e-20,1", packing="best-fit", document_mask=True))
    assert (error.flag, error.rule) == ("--split", "leaves nothing to train on")
    # best-fit does not split the one document.
    for packing, empty in (("concatenate", False), ("best-fit", True)):
        data = open_data(config(one, packing=packing, document_mask=True), seed=0)
        assert (data.rows.valid is None) == empty
        assert any("nothing is validated" in note for note in data.notes) == empty
    own = DataConfig(train_data_path=(one,), seq_length=16)
    assert not open_data(own, seed=0).notes


def test_a_weight_too_small_for_a_float_is_refused(tmp_path: Path) -> None:
    pair = indexed(tmp_path / "a", [99])
    error = refused(config("1e-99999999", pair, "1", pair))
    assert error.rule == "a weight must be above zero"


def test_a_pair_without_its_index_is_refused(tmp_path: Path) -> None:
    pair = indexed(tmp_path / "a", [99])
    (tmp_path / "a.idx").unlink()
    error = refused(config(pair))
    assert (error.value, error.rule) == (f"{pair}.idx", "there is no such file")
