"""Text that is printed piece by piece is the whole text, wherever its characters are split."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.data.tokenize.open_tokenizer import open_tokenizer
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer, Ids
from cp_megatron.errors import ConfigError
from cp_megatron.generate.dialogue import answer_lines, as_utf8, pieces


class CutAnywhere(ByteTokenizer):
    """Tokens are one to three bytes; decoding drops a space at the beginning of a text."""

    vocab_size = 1 << 26
    eod = (1 << 26) - 1

    def cut(self, text: str, widths: list[int]) -> list[int]:
        tokens: list[int] = []
        data = text.encode()
        while data:
            width = widths[len(tokens) % len(widths)]
            tokens.append(int.from_bytes(b"\1" + data[:width], "big"))
            data = data[width:]
        return tokens

    def decode(self, tokens: object) -> str:
        data = b"".join(t.to_bytes(4, "big").lstrip(b"\0")[1:] for t in tokens)  # type: ignore[attr-defined]
        return data.decode("utf-8", errors="replace").removeprefix(" ")


@given(st.text(), st.lists(st.integers(1, 3), min_size=1))
def test_pieces_joined_are_the_text(text: str, widths: list[int]) -> None:
    tokenizer = CutAnywhere()
    tokens = tokenizer.cut(text, widths)
    found = list(pieces(tokens, tokenizer))
    assert "".join(found) == text.removeprefix(" ")
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@given(st.lists(st.integers(0, 255)))
def test_invalid_bytes_are_printed(tokens: list[int]) -> None:
    tokenizer = open_tokenizer("byte", None)
    assert "".join(pieces(tokens, tokenizer)) == tokenizer.decode(tokens)


def test_a_character_is_printed_as_soon_as_it_is_complete() -> None:
    tokens: Ids = ByteTokenizer().encode("aïb")
    shown: list[tuple[int, str]] = []
    read = 0

    def counted() -> Iterator[int]:
        nonlocal read
        for token in tokens.tolist():
            read += 1
            yield token

    for piece in pieces(counted(), ByteTokenizer()):
        shown.append((read, piece))
    assert shown == [(1, "a"), (3, "ï"), (4, "b")]


def test_every_line_is_answered_until_the_end() -> None:
    out = io.StringIO()
    answer_lines(lambda line: iter([line, "!"]), source=io.StringIO("one\n\n two \nlast"), out=out)
    assert out.getvalue() == "one!\n two !\nlast!\n"


def test_ctrl_c_ends_an_answer_and_not_the_dialogue() -> None:
    def answer(line: str) -> Iterator[str]:
        yield line
        if line == "long":
            raise KeyboardInterrupt
        yield "."

    out = io.StringIO()
    answer_lines(answer, source=io.StringIO("long\nshort\n"), out=out)
    assert out.getvalue() == "long\nshort.\n"


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def picky(line: str) -> Iterator[str]:
    if line.isupper():
        raise ConfigError("--chat", "", "do not shout")
    yield line


def test_in_a_terminal_an_error_is_printed_and_the_dialogue_continues() -> None:
    out = Terminal()
    answer_lines(picky, source=Terminal("one\nTWO\nthree\n"), out=out)
    refusal = "> generate.py: error: --chat: do not shout\n"
    assert out.getvalue().endswith(f"> one\n{refusal}> three\n> \n")


def test_an_error_in_a_file_of_lines_ends_the_program() -> None:
    out = io.StringIO()
    with pytest.raises(ConfigError, match="do not shout"):
        answer_lines(picky, source=io.StringIO("one\nTWO\nthree\n"), out=out)
    assert out.getvalue() == "one\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_invalid_bytes_are_read(errors: str) -> None:
    source = io.TextIOWrapper(io.BytesIO(b"na\xc3\xafve \xff\n"), encoding="ascii", errors=errors)
    as_utf8(source)
    assert source.readline() == "na\u00efve \ufffd\n"
