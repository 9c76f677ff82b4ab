"""Megatron's pairs: compared with bytes made by hand, and every way in which one can be wrong."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cp_megatron.data.read import indexed
from cp_megatron.data.read.indexed import CODES, IndexedDataset, optimal_dtype, write_indexed
from cp_megatron.errors import ConfigError
from tests.data.ranges import sequence_of, write_pair


def index_bytes(
    code: int = 8,
    lengths: tuple[int, ...] = (3, 0, 2),
    pointers: tuple[int, ...] = (0, 6, 6),
    documents: tuple[int, ...] = (0, 1, 2, 3),
    magic: bytes = b"MMIDIDX\x00\x00",
    version: int = 1,
    modes: bytes = b"",
) -> bytes:
    """An .idx by the description of the format, without code of the reader."""
    head = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    head += struct.pack("<QQ", len(lengths), len(documents))
    body = b"".join(struct.pack("<i", value) for value in lengths)
    body += b"".join(struct.pack("<q", value) for value in pointers)
    return head + body + b"".join(struct.pack("<q", value) for value in documents) + modes


BINARY = struct.pack("<5H", 1, 2, 65535, 4, 5)


def write(folder: Path, index: bytes, binary: bytes = BINARY) -> str:
    prefix = str(folder / "pair")
    Path(prefix + ".idx").write_bytes(index)
    Path(prefix + ".bin").write_bytes(binary)
    return prefix


def test_a_pair_made_by_hand_is_read(tmp_path: Path) -> None:
    data = IndexedDataset.open(write(tmp_path, index_bytes()))
    assert data.tokens.dtype == np.uint16
    assert data.lengths.tolist() == [3, 0, 2]
    assert data.document_index.tolist() == [0, 1, 2, 3]
    assert data.starts.tolist() == [0, 3, 3]
    assert data.tokens.tolist() == [1, 2, 65535, 4, 5]
    assert [sequence_of(data, n).tolist() for n in range(3)] == [[1, 2, 65535], [], [4, 5]]
    with pytest.raises(ValueError, match="read-only"):
        data.tokens[0] = 1


def test_a_pair_is_written_byte_for_byte(tmp_path: Path) -> None:
    prefix = str(tmp_path / "new" / "pair")
    write_pair(prefix, [[1, 2, 65535], [], [4, 5]], vocab_size=65499)
    assert Path(prefix + ".idx").read_bytes() == index_bytes()
    assert Path(prefix + ".bin").read_bytes() == BINARY
    assert sorted(path.name for path in Path(prefix).parent.iterdir()) == ["pair.bin", "pair.idx"]


def test_files_are_appended_whole(tmp_path: Path) -> None:
    pieces = [(tmp_path / "0", [3, 0]), (tmp_path / "1", []), (tmp_path / "2", [2])]
    for (path, _), ids in zip(pieces, (BINARY[:6], b"", BINARY[6:])):
        path.write_bytes(ids)
    parts = [(path, np.array(lengths, dtype=np.int32)) for path, lengths in pieces]
    write_indexed(str(tmp_path / "pair"), parts, vocab_size=300)
    assert (tmp_path / "pair.idx").read_bytes() == index_bytes()
    assert (tmp_path / "pair.bin").read_bytes() == BINARY


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    missing = [(tmp_path / "missing", np.array([3], dtype=np.int32))]
    with pytest.raises(FileNotFoundError):
        write_indexed(str(tmp_path / "pair"), missing, vocab_size=300)
    assert list(tmp_path.iterdir()) == []


def test_the_type_of_the_writer() -> None:
    assert optimal_dtype(65499) == np.uint16
    assert optimal_dtype(65500) == np.int32


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_every_type_of_whole_numbers(code: int, tmp_path: Path) -> None:
    dtype = np.dtype(CODES[code])
    index = index_bytes(code, pointers=(0, 3 * dtype.itemsize, 3 * dtype.itemsize))
    data = IndexedDataset.open(write(tmp_path, index, np.arange(5, dtype=dtype).tobytes()))
    assert data.tokens.tolist() == [0, 1, 2, 3, 4]


def test_documents_of_several_sequences_and_modes(tmp_path: Path) -> None:
    index = index_bytes(documents=(0, 2, 2, 3), modes=b"\0\1\0")
    assert IndexedDataset.open(write(tmp_path, index)).document_index.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("index", "rule"),
    [
        (b"", "truncated: 0 bytes"),
        (index_bytes()[:33], "truncated: 33 bytes"),
        (index_bytes()[:-1], "is truncated"),
        (index_bytes() + b"\0", "too long"),
        (index_bytes(magic=b"MMIDIDY\0\0"), "does not begin"),
        (index_bytes(version=2), "version 2"),
        (index_bytes(code=0), "code 0"),
        (index_bytes(code=9), "code 9"),
        (index_bytes(code=7), "float32"),
        (index_bytes(code=6), "float64"),
        (index_bytes(lengths=(3, -1, 3)), "sequence 1 the length -1"),
        (index_bytes(pointers=(0, 6, 8)), "sequence 2 begins at byte 8"),
        (index_bytes(pointers=(2, 6, 6)), "sequence 0 begins at byte 2"),
        (index_bytes(pointers=(0, 6, -6)), "sequence 2 begins at byte -6"),
        (index_bytes(documents=()), "does not begin with 0"),
        (index_bytes(documents=(1, 2, 3)), "does not begin with 0"),
        (index_bytes(documents=(0, 2, 1, 3)), "decreases at entry 2"),
        (index_bytes(documents=(0, 1, 2)), "ends with 2"),
        (index_bytes(documents=(0, 1, 4)), "ends with 4"),
        (index_bytes(lengths=(0, 0, 0), pointers=(0, 0, 0)), "holds no ids"),
        (index_bytes(code=4, pointers=(0, 12, 12)), "has 10 bytes"),
    ],
)
def test_refused(index: bytes, rule: str, tmp_path: Path) -> None:
    prefix = write(tmp_path, index)
    with pytest.raises(ConfigError, match=rule) as caught:
        IndexedDataset.open(prefix, flag="--data")
    suffix = ".bin" if "has 10 bytes" in rule else ".idx"
    assert (caught.value.flag, caught.value.value) == ("--data", prefix + suffix)
    assert caught.value.works


@pytest.mark.parametrize("binary", [b"", BINARY[:-1], BINARY + b"\0\0"])
def test_a_bin_of_another_size(binary: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"has {len(binary)} bytes, but its .idx says 5 ids"):
        IndexedDataset.open(write(tmp_path, index_bytes(), binary))


def test_missing_and_other_files(tmp_path: Path) -> None:
    prefix = write(tmp_path, index_bytes())
    for suffix in (".bin", ".idx"):
        os.remove(prefix + suffix)
        with pytest.raises(ConfigError, match="no such file"):
            IndexedDataset.open(prefix)
        os.mkfifo(prefix + suffix)
        with pytest.raises(ConfigError, match="regular file"):
            IndexedDataset.open(prefix)
        os.remove(prefix + suffix)
        write(tmp_path, index_bytes())


def test_ids_outside_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = IndexedDataset.open(write(tmp_path, index_bytes()))
    data.check_vocabulary(65536)
    signed = index_bytes(code=3)
    for chunk in (1, 2, 1 << 24):
        monkeypatch.setattr(indexed, "_CHUNK", chunk)
        with pytest.raises(ConfigError, match=r"id 65535 at position 2 \(sequence 0\)"):
            data.check_vocabulary(65535)
        with pytest.raises(ConfigError, match=r"id 4 at position 3 \(sequence 2\)"):
            IndexedDataset.open(
                write(tmp_path, signed, struct.pack("<5h", 1, 2, 3, 4, 5))
            ).check_vocabulary(4)
        with pytest.raises(ConfigError, match="id -1 at position 2"):
            IndexedDataset.open(write(tmp_path, signed)).check_vocabulary(70000)
        write(tmp_path, index_bytes())


def test_the_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    def fingerprint(folder: str, index: bytes, binary: bytes) -> str:
        (tmp_path / folder).mkdir()
        return IndexedDataset.open(write(tmp_path / folder, index, binary)).fingerprint

    prints = [
        fingerprint("a", index_bytes(), BINARY),
        fingerprint("b", index_bytes(), BINARY),
        fingerprint("c", index_bytes(documents=(0, 2, 3)), BINARY),
        fingerprint("d", index_bytes(), BINARY[::-1]),
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, len(index_bytes(modes=b"\0\0\0")) - 1),
    value=st.integers(0, 255),
    cut=st.integers(0, 120),
    more=st.binary(max_size=9),
    harm=st.sampled_from(["flip", "cut", "extend"]),
    modes=st.sampled_from([b"", b"\0\0\0"]),
)
def test_a_harmed_index_is_refused_or_harmless(
    place: int, value: int, cut: int, more: bytes, harm: str, modes: bytes, tmp_path: Path
) -> None:
    whole = index_bytes(modes=modes)
    harmed = bytearray(whole)
    if harm == "flip":
        harmed[min(place, len(whole) - 1)] = value
    elif harm == "cut":
        harmed = harmed[:cut]
    else:
        harmed += more
    prefix = write(tmp_path, bytes(harmed))
    try:
        data = IndexedDataset.open(prefix)
    except ConfigError:
        return
    # A reader cannot notice other documents of the same sequences, i2 instead of u2, or modes.
    assert data.lengths.tolist() == [3, 0, 2]
    assert [sequence_of(data, n).view("<u2").tolist() for n in range(3)] == [
        [1, 2, 65535],
        [],
        [4, 5],
    ]
