"""Text files as documents: what is read, what is skipped, what is refused."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cp_megatron.data.read import text_files
from cp_megatron.data.read.corpus import Corpus
from cp_megatron.data.read.text_files import check_text_files, load_text_files
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer
from cp_megatron.errors import ConfigError

BYTES = ByteTokenizer()
EOD = BYTES.eod


def load(paths: Sequence[str]) -> Corpus:
    return load_text_files(paths, BYTES)


def texts_of(corpus: Corpus) -> list[str]:
    documents = np.split(corpus.tokens, corpus.document_starts[1:])
    assert all(document[-1] == EOD for document in documents)
    return [BYTES.decode(document) for document in documents]


def write(path: Path, contents: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return str(path)


def test_documents_end_with_eod(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "b.txt", b"bb")
    write(folder / "sub" / "a.txt", b"a")
    one = write(tmp_path / "one.md", b"1")
    corpus = load([str(folder), one])
    assert corpus.tokens.dtype == np.uint16
    assert corpus.tokens.tolist() == [98, 98, EOD, 97, EOD, 49, EOD]
    assert corpus.document_starts.tolist() == [0, 3, 5]
    assert corpus.skipped == 0


def test_a_folder_is_read_by_content(tmp_path: Path) -> None:
    write(tmp_path / "text.bin", "é".encode())
    write(tmp_path / "latin.txt", "é".encode("latin-1"))
    write(tmp_path / "nul.txt", b"a\0b")
    write(tmp_path / "cut.txt", "é".encode()[:1])
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / ".hidden", b"hidden")
    write(tmp_path / ".git" / "config", b"hidden")
    corpus = load([str(tmp_path)])
    assert texts_of(corpus) == ["é"]
    assert corpus.skipped == 3


def test_a_character_may_lie_across_two_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", "€€€".encode())
    for size in (1, 2, 4):
        monkeypatch.setattr(text_files, "DECODED_BYTES", size)
        monkeypatch.setattr(text_files, "PROBE_BYTES", size)
        check_text_files([path])
        assert len(load([path]).tokens) == 10


@pytest.mark.parametrize("reader", [check_text_files, load])
class TestRefused:
    """Both readers refuse alike."""

    def refuse(self, reader: object, path: str, rule: str) -> ConfigError:
        assert callable(reader)
        with pytest.raises(ConfigError, match=rule) as caught:
            reader([path])
        assert caught.value.flag == "--data-path"
        assert caught.value.works
        return caught.value

    def test_missing(self, reader: object, tmp_path: Path) -> None:
        near = write(tmp_path / "corpus.txt", b"text")
        error = self.refuse(reader, str(tmp_path / "corpsu.txt"), "no such file")
        assert error.works == near

    def test_missing_parent(self, reader: object, tmp_path: Path) -> None:
        self.refuse(reader, str(tmp_path / "none" / "corpus.txt"), "no such file")

    def test_empty(self, reader: object, tmp_path: Path) -> None:
        self.refuse(reader, write(tmp_path / "empty.txt", b""), "is empty")

    @pytest.mark.parametrize("contents", [b"a\0b", b"\xff\xfe", "é".encode()[:1]])
    def test_not_text(self, reader: object, contents: bytes, tmp_path: Path) -> None:
        self.refuse(reader, write(tmp_path / "data.txt", contents), "not UTF-8 text")

    def test_folder_without_text(self, reader: object, tmp_path: Path) -> None:
        write(tmp_path / "data.bin", b"\0")
        write(tmp_path / "empty.txt", b"")
        self.refuse(reader, str(tmp_path), "holds no text file")

    def test_not_a_regular_file(self, reader: object, tmp_path: Path) -> None:
        # Opening a pipe without a writer would hang.
        os.mkfifo(tmp_path / "pipe")
        self.refuse(reader, str(tmp_path / "pipe"), "regular file")

    def test_one_good_path_does_not_excuse_a_bad_one(self, reader: object, tmp_path: Path) -> None:
        good = write(tmp_path / "good.txt", b"text")
        assert callable(reader)
        with pytest.raises(ConfigError, match="no such file"):
            reader([good, str(tmp_path / "bad")])


def test_the_whole_of_an_explicit_file_must_be_text(tmp_path: Path) -> None:
    path = write(tmp_path / "late.txt", b"a" * text_files.PROBE_BYTES + b"\xff")
    check_text_files([path])  # reads the beginning only
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load([path])


def test_the_fingerprint_is_of_names_and_contents_not_of_places(tmp_path: Path) -> None:
    for folder in ("a", "b", "renamed", "changed", "moved"):
        write(tmp_path / folder / "x.txt", b"one")
        write(tmp_path / folder / "y.txt", b"two")
    (tmp_path / "renamed" / "y.txt").rename(tmp_path / "renamed" / "z.txt")
    (tmp_path / "changed" / "y.txt").write_bytes(b"twO")
    # The same bytes in sum, one of them in the other document.
    write(tmp_path / "moved" / "x.txt", b"onet")
    write(tmp_path / "moved" / "y.txt", b"wo")
    prints = {
        folder: load([str(tmp_path / folder)]).fingerprint
        for folder in ("a", "b", "renamed", "changed", "moved")
    }
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 4


def test_the_default_is_the_standard_library() -> None:
    check_text_files([])
    corpus = load([])
    assert len(corpus.tokens) > 4_000_000
    documents = set(texts_of(corpus))
    assert (corpus.tokens == EOD).sum() == len(corpus.document_starts)
    library = Path(sysconfig.get_path("stdlib"))
    assert {(library / name).read_text() for name in ("ast.py", "json/decoder.py")} <= documents
    left_out = [path for path in (library / "idlelib").glob("*.py") if path.stat().st_size]
    assert documents.isdisjoint(path.read_text("utf-8", "replace") for path in left_out)
    assert corpus.fingerprint == load([]).fingerprint


class Words:
    """A tokenizer of letters: "a" is 1; 0 ends a document."""

    kind = "huggingface"
    path = None
    vocab_size, eod, fingerprint = 30, 0, "words"
    opening: tuple[int, ...] = ()

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array([ord(letter) - 96 for letter in text], dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: npt.ArrayLike) -> str:
        return "".join(chr(token + 96) for token in np.asarray(tokens))


def test_a_tokenizer_gives_ids_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write(tmp_path / "one", b"abc"), write(tmp_path / "two", b"z")
    corpus = load_text_files([one, two], Words())
    assert corpus.tokens.tolist() == [1, 2, 3, 0, 26, 0]
    assert corpus.document_starts.tolist() == [0, 4]
    assert (corpus.eod, corpus.vocab_size) == (0, 30)
    monkeypatch.setattr(text_files, "MOST_TOKENISED", 3)
    assert load_text_files([one], Words())
    with pytest.raises(ConfigError, match=r"launch/prepare_data\.py") as caught:
        load_text_files([one, two], Words())
    assert caught.value.value == two
    assert load([one, two]), "bytes take no time"
