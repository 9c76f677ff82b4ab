"""Prints text while it is generated, and answers lines of input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from typing import TextIO

from cp_megatron.cli.programs import GENERATE
from cp_megatron.cli.refusal import error_line
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError

Respond = Callable[[str], Iterator[str]]
"""Converts a line of input into pieces of the answer."""

_REPLACEMENT = "\ufffd"


def pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of tokens in pieces that can be printed immediately.

    A character can be split between tokens. Its first part decodes as U+FFFD, so text that ends in
    U+FFFD is held back::

        tokens      "na" | "i" | C3 | AF | "f"
        decoded     na     nai  nai\ufffd  naï   naïf
        printed     na     i            ï     f

    After every complete character, decoding starts again at the tokens that were printed last and
    not at the new one, because some tokenizers drop a space at the beginning of a text.
    """
    window: list[int] = []
    known = 0
    shown = ""
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        whole = text.rstrip(_REPLACEMENT)
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
    """Makes a stream decode UTF-8 in every locale; invalid bytes become U+FFFD."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="replace")


def print_answer(answer: Iterator[str], out: TextIO) -> None:
    """Prints the pieces of an answer as they come; Ctrl-C ends the answer."""
    with suppress(KeyboardInterrupt):
        for piece in answer:
            print(piece, end="", file=out, flush=True)
    print(file=out, flush=True)


def answer_lines(respond: Respond, *, source: TextIO, out: TextIO) -> None:
    """Answers each line until the end of the input (Ctrl-D); empty lines are skipped.

    In a terminal, an error is printed and the dialogue continues.

    Raises:
        ConfigError: a line cannot be answered, and input or output is not a terminal.
    """
    interactive = source.isatty() and out.isatty()
    if interactive:
        out.write("Type a line. Ctrl-C ends an answer, Ctrl-D ends the program.\n")
    while True:
        if interactive:
            print("> ", end="", file=out, flush=True)
        line = ""
        with suppress(KeyboardInterrupt):
            line = source.readline()
        if not line:
            break
        if not line.strip():
            continue
        try:
            print_answer(respond(line.rstrip("\n")), out)
        except ConfigError as error:
            if not interactive:
                raise
            out.write(f"{error_line(error, GENERATE.name)}\n")
    if interactive:
        out.write("\n")
