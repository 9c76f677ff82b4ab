"""Text that appears token by token, and the lines of a person it answers. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from typing import TextIO

from cp_megatron.cli.programs import GENERATE
from cp_megatron.cli.refusal import error_line
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

Answer = Callable[[str], Iterator[str]]
"""A person's words -> pieces of the answer."""

_BROKEN = "\ufffd"


def pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of tokens in pieces that can be printed at once; joined they are the whole text.

    A letter may be cut between tokens. Its half decodes as U+FFFD, so what ends in that waits:

        tokens      "na" | "i" | C3 | AF | "f"
        decoded     na     nai  nai\ufffd  naï   naïf
        printed     na     i            ï     f

    Decoding starts again after every whole letter, with the tokens printed last in front, because
    some tokenizers drop a space at the beginning of a text.
    """
    window: list[int] = []
    known = 0
    shown = ""
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        whole = text.rstrip(_BROKEN)
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
        if whole == text:
            window, known = window[known:], len(window) - known
            shown = tokenizer.decode(window)
    rest = tokenizer.decode(window)[len(shown) :]
    if rest:
        yield rest


def as_utf8(stream: TextIO) -> None:
    """Has a person's bytes read as UTF-8 in every locale; what is no text becomes U+FFFD."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="replace")


def speak(answer: Iterator[str], out: TextIO) -> None:
    """Prints an answer as it comes; Ctrl-C ends it."""
    with suppress(KeyboardInterrupt):
        for piece in answer:
            out.write(piece)
            out.flush()
    out.write("\n")
    out.flush()


def talk(answer: Answer, *, source: TextIO, out: TextIO) -> None:
    """Answers each line until the end of the input (Ctrl-D); empty ones are passed over.

    A person is told what can not be answered, and goes on.

    Raises:
        ConfigError: a line can not be answered, and no person is there.
    """
    person = source.isatty() and out.isatty()
    if person:
        out.write("A line is gone on from; Ctrl-C ends an answer, Ctrl-D ends.\n")
    while True:
        if person:
            out.write("> ")
            out.flush()
        try:
            line = source.readline()
        except KeyboardInterrupt:
            break
        if not line:
            break
        if not line.strip():
            continue
        try:
            speak(answer(line.rstrip("\n")), out)
        except ConfigError as error:
            if not person:
                raise
            out.write(f"{error_line(error, GENERATE.name)}\n")
    if person:
        out.write("\n")
