"""Makes questions about a long text: find a needle, follow a chain of variables.

The questions follow RULER (Hsieh et al. 2024, arXiv:2404.06654, section 3), in any text::

    needle      intro | ...sentence. [The special magic number for river is 4711234.] sentence... |
                question | answer
    variables   intro | ... [VAR QZJFK = 52713.] ... [VAR MWHBX = VAR QZJFK.] ... |
                question | answer

A task is a pure function of (seed, kind, length, depth, sample) and the haystack. It has exactly
``length`` tokens: every piece is tokenized on its own and inserted at the end of a sentence, and
the haystack is cut at its front. So it begins inside a sentence and ends with a whole one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError

Kind = Literal["needle", "variables"]
Tokens = npt.NDArray[np.int64]
Encode = Callable[[str], npt.ArrayLike]
"""Converts text to tokens, without special tokens."""
Draw = Callable[[int], int]
"""Draws one of 0 .. count - 1; the bias of the remainder is below count / 2**64."""

NAMES_IN_CHAIN = 5
LONGEST_SENTENCE = 400
"""Characters. A longer sentence is cut between two words."""

_WORDS = (
    "river window garden copper harbour pencil mountain violin lantern "
    "orchard blanket compass feather granite island kettle ladder meadow "
    "needle oyster parade quarry ribbon saddle temple umbrella valley"
)
_NEEDLE_INTRO = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
_VARIABLES_INTRO = (
    "Memorize and track the chain of variable assignments hidden in the following text.\n"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question with its text and its answer.

    Attributes:
        kind: the kind of question.
        tokens: int64 [length], the intro, the text, the question and the answer.
        answer_start: the index of the answer's first token.
        answer: the answer as text.
        depth: the requested depth in percent; 0 for variables, which are spread over the text.
        sample: the number of the task among tasks of the same kind, length and depth.
    """

    kind: Kind
    tokens: Tokens
    answer_start: int
    answer: str
    depth: int
    sample: int

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """A tokenized text.

    Attributes:
        tokens: int64 [n].
        borders: int64 [sentences + 1], increasing from 0 to n: the boundaries of the sentences.
    """

    tokens: Tokens
    borders: Tokens

    @classmethod
    def of(cls, text: str, encode: Encode) -> Haystack:
        """Cuts ``text`` into sentences and tokenizes each one on its own.

        Raises:
            ConfigError: the text has no sentence.
        """
        pieces = [piece for line in sentences(text) if (piece := _encoded(encode, line)).size]
        if not pieces:
            raise ConfigError("--data-path", "", "holds no sentence to hide a needle in", "prose")
        borders = np.cumsum([0, *map(len, pieces)]).astype(np.int64)
        return cls(tokens=np.concatenate(pieces), borders=borders)

    def window(self, size: int, end: int) -> tuple[Tokens, Tokens]:
        """Returns the ``size`` tokens before the border number ``end``; the text is repeated.

        Returns:
            int64 [size], and the indices in it where a sentence can be inserted: 0, each border
            inside, and ``size``, in increasing order.
        """
        total, last = len(self.tokens), int(self.borders[end])
        rounds = np.arange((last - size) // total, last // total + 1)
        borders = (self.borders[:-1] + rounds[:, None] * total).ravel() - (last - size)
        inside = borders[(borders > 0) & (borders < size)]
        places = np.concatenate([[0], inside, [size]]).astype(np.int64)
        return self.tokens[np.arange(last - size, last) % total], places


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, each on one line after a space.

    The space precedes the words because most tokenizers join it to the word that follows.
    """
    lines: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
        words, line = sentence.split(), ""
        for word in words:
            if line and len(line) + len(word) >= LONGEST_SENTENCE:
                lines.append(line)
                line = ""
            line += f" {word}"
        if line:
            lines.append(line)
    return lines


def library_prose() -> str:
    """Returns English prose that ships with Python: the language reference of ``help()``."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def make_task(
    kind: Kind,
    haystack: Haystack,
    encode: Encode,
    *,
    seed: int,
    length: int,
    depth: int = 0,
    sample: int = 0,
) -> Task:
    """Makes one task.

    Args:
        kind: ``needle`` inserts one sentence at the border nearest to ``depth``; ``variables``
            inserts the sentences of a chain at borders all over the text, in order.
        haystack: the text.
        encode: the tokenizer that the haystack was made with.
        seed: >= 0.
        length: the number of tokens, including intro, question and answer.
        depth: in percent of the text.
        sample: the number of the task among tasks of the same kind, length and depth, >= 0.

    Raises:
        ConfigError: the length leaves no token for the text.
    """
    draw = _draws(seed, kind, length, depth, sample)
    words = _words_of(kind, draw)
    intro, question, *hidden, answer = encoded = [_encoded(encode, part) for part in words]
    needed = sum(map(len, encoded))
    size = length - needed
    if size < 1:
        rule = f"{kind} needs {needed + 1} tokens for its question alone"
        power_of_two = 1 << (2 * needed - 1).bit_length()
        raise ConfigError("--lengths", length, rule, str(power_of_two))
    text, borders = haystack.window(size, 1 + draw(len(haystack.borders) - 1))
    if kind == "variables":  # several can share a border
        places = sorted(draw(len(borders)) for _ in hidden)
    else:
        places = [int(np.abs(borders * 100 - depth * size).argmin())]
    first, *others = np.split(text, borders[places])
    middle = chain.from_iterable(zip(hidden, others, strict=True))
    return Task(
        kind=kind,
        tokens=np.concatenate([intro, first, *middle, question, answer]),
        answer_start=length - len(answer),
        answer=words[-1],
        depth=depth,
        sample=sample,
    )


def _words_of(kind: Kind, draw: Draw) -> tuple[str, ...]:
    """Returns the intro, the question, the sentences to insert and the answer."""
    if kind == "needle":
        words = _WORDS.split()
        word, number = words[draw(len(words))], 1_000_000 + draw(9_000_000)
        needle = f" The special magic number for {word} is {number}."
        question = (
            f"\nWhat is the special magic number for {word} mentioned in the text above? "
            f"The special magic number for {word} is"
        )
        return _NEEDLE_INTRO, question, needle, f" {number}"
    names: list[str] = []
    while len(names) < NAMES_IN_CHAIN:
        name = "".join(chr(ord("A") + draw(26)) for _ in range(5))
        if name not in names:
            names.append(name)
    value = 10_000 + draw(90_000)
    values = [str(value), *(f"VAR {name}" for name in names)]
    chained = [f" VAR {name} = {held}." for name, held in zip(names, values)]
    question = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.\n"
        f"Answer: {NAMES_IN_CHAIN} variables are assigned the value {value}, they are:"
    )
    return _VARIABLES_INTRO, question, *chained, "".join(f" {name}" for name in names)


def _encoded(encode: Encode, text: str) -> Tokens:
    return np.asarray(encode(text), dtype=np.int64)


def _draws(seed: int, *numbers: object) -> Draw:
    """The random numbers of one task: Philox's raw output, which is equal on every machine."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    key = np.array([seed % 2**64, int.from_bytes(digest[:8], "little")], dtype=np.uint64)
    bits = np.random.Philox(key=key)
    return lambda count: int(bits.random_raw()) % count
