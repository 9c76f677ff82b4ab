"""Files to tokens: what is read, what is skipped, what is refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cp_megatron.data.read import sources
from cp_megatron.data.read.sources import (
    EOD,
    VOCAB_SIZE,
    check_sources,
    decode,
    encode,
    load_corpus,
)
from cp_megatron.errors import ConfigError


def write(path: Path, contents: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return str(path)


def test_bytes_are_tokens() -> None:
    text = "naïve €"
    assert encode(text).tolist() == list(text.encode())
    assert decode([*encode(text), EOD]) == text
    assert decode([0xE2, 0x82]) == "\N{REPLACEMENT CHARACTER}"
    assert decode([]) == ""
    with pytest.raises(ValueError, match="257"):
        decode([VOCAB_SIZE])


def test_documents_end_with_eod(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "b.txt", b"bb")
    write(folder / "sub" / "a.txt", b"a")
    one = write(tmp_path / "one.md", b"1")
    corpus = load_corpus([str(folder), one])
    assert corpus.tokens.dtype == np.uint16
    assert corpus.tokens.tolist() == [98, 98, EOD, 97, EOD, 49, EOD]
    assert corpus.document_starts.tolist() == [0, 3, 5]
    assert corpus.names == ("b.txt", "sub/a.txt", "one.md")
    assert corpus.skipped == 0


def test_a_folder_is_read_by_content(tmp_path: Path) -> None:
    write(tmp_path / "text.bin", "é".encode())
    write(tmp_path / "latin.txt", "é".encode("latin-1"))
    write(tmp_path / "nul.txt", b"a\0b")
    write(tmp_path / "cut.txt", "é".encode()[:1])
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / ".hidden", b"hidden")
    write(tmp_path / ".git" / "config", b"hidden")
    corpus = load_corpus([str(tmp_path)])
    assert corpus.names == ("text.bin",)
    assert corpus.skipped == 3


def test_a_character_may_lie_across_two_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", "€€€".encode())
    for size in (1, 2, 4):
        monkeypatch.setattr(sources, "PIECE_BYTES", size)
        monkeypatch.setattr(sources, "PROBE_BYTES", size)
        check_sources([path])
        assert len(load_corpus([path]).tokens) == 10


@pytest.mark.parametrize("reader", [check_sources, load_corpus])
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
        # Opening a pipe that nobody writes to would hang.
        os.mkfifo(tmp_path / "pipe")
        self.refuse(reader, str(tmp_path / "pipe"), "regular file")

    def test_one_good_path_does_not_excuse_a_bad_one(self, reader: object, tmp_path: Path) -> None:
        good = write(tmp_path / "good.txt", b"text")
        assert callable(reader)
        with pytest.raises(ConfigError, match="no such file"):
            reader([good, str(tmp_path / "bad")])


def test_the_whole_of_an_explicit_file_must_be_text(tmp_path: Path) -> None:
    path = write(tmp_path / "late.txt", b"a" * sources.PROBE_BYTES + b"\xff")
    check_sources([path])  # looks at the beginning only
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_corpus([path])


def test_the_fingerprint_is_of_names_and_contents_not_of_places(tmp_path: Path) -> None:
    for folder in ("a", "b", "renamed", "changed", "moved"):
        write(tmp_path / folder / "x.txt", b"one")
        write(tmp_path / folder / "y.txt", b"two")
    (tmp_path / "renamed" / "y.txt").rename(tmp_path / "renamed" / "z.txt")
    (tmp_path / "changed" / "y.txt").write_bytes(b"twO")
    # The same bytes in all, one moved from one document to the other.
    write(tmp_path / "moved" / "x.txt", b"onet")
    write(tmp_path / "moved" / "y.txt", b"wo")
    prints = {
        folder: load_corpus([str(tmp_path / folder)]).fingerprint
        for folder in ("a", "b", "renamed", "changed", "moved")
    }
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 4


def test_the_default_is_the_standard_library() -> None:
    check_sources([])
    corpus = load_corpus([])
    assert len(corpus.tokens) > 4_000_000
    assert {"ast.py", "json/decoder.py"} <= set(corpus.names)
    assert not any(
        name.split("/")[0] in {"test", "idlelib", "site-packages"} for name in corpus.names
    )
    assert corpus.tokens[-1] == EOD
    assert (corpus.tokens == EOD).sum() == len(corpus.names) == len(corpus.document_starts)
    assert (corpus.tokens[corpus.document_starts[1:] - 1] == EOD).all()
    start = corpus.document_starts[corpus.names.index("ast.py")]
    assert decode(corpus.tokens[start : start + 3]) == '"""'
    assert corpus.fingerprint == load_corpus([]).fingerprint


class Words:
    """A tokenizer of letters: "a" is 1; 0 ends a document."""

    kind = "huggingface"
    path = None
    vocab_size, eod, fingerprint = 30, 0, "words"

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array([ord(letter) - 96 for letter in text], dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: npt.ArrayLike) -> str:
        return "".join(chr(token + 96) for token in np.asarray(tokens))


def test_a_tokenizer_gives_ids_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write(tmp_path / "one", b"abc"), write(tmp_path / "two", b"z")
    corpus = load_corpus([one, two], Words())
    assert corpus.tokens.tolist() == [1, 2, 3, 0, 26, 0]
    assert corpus.document_starts.tolist() == [0, 4]
    assert (corpus.eod, corpus.vocab_size) == (0, 30)
    monkeypatch.setattr(sources, "MOST_TOKENISED", 3)
    assert load_corpus([one], Words())
    with pytest.raises(ConfigError, match=r"launch/prepare_data\.py") as caught:
        load_corpus([one, two], Words())
    assert caught.value.value == two
    assert load_corpus([one, two]), "bytes take no time"
