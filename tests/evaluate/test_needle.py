"""Needle tasks: literal examples, and properties of every task."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_megatron.data.tokenize.tokenizer import ByteTokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.evaluate.needle import (
    LONGEST_SENTENCE,
    Haystack,
    Kind,
    library_prose,
    make_task,
    sentences,
)

TEXT = "One fish. Two fish are here. Red fish! Blue fish swim far away, or do they? Yes."
encode, decode = ByteTokenizer().encode, ByteTokenizer().decode
HAYSTACK = Haystack.of(TEXT, encode)


WORDS: dict[str, int] = {}


def by_word(text: str) -> npt.NDArray[np.int64]:
    """Another tokenizer: one token per word or other character."""
    return np.array([WORDS.setdefault(x, len(WORDS)) for x in re.findall(r" ?\w+|\W", text)])


def text_of_words(tokens: npt.NDArray[np.int64]) -> str:
    words = list(WORDS)
    return "".join(words[token] for token in tokens)


def test_a_literal_needle() -> None:
    task = make_task("needle", HAYSTACK, encode, seed=1, length=400, depth=50)
    text = decode(task.tokens)
    found = re.fullmatch(
        r"A special magic number is hidden .* afterwards\.\n(.*) The special magic number for "
        r"(\w+) is (\d{7})\.( .*)\nWhat is the special magic number for (\w+) mentioned in the "
        r"text above\? The special magic number for (\w+) is (\d{7})",
        text,
    )
    assert found, text
    before, word, number, after, *words, answer = found.groups()
    assert words == [word, word]
    assert answer == number == task.answer.strip()
    assert before[-1] in ".!?"
    assert after[-1] in ".!?"
    assert (before + after) in " ".join([TEXT] * 10)


def test_a_literal_chain() -> None:
    task = make_task("variables", HAYSTACK, encode, seed=1, length=700)
    text = decode(task.tokens)
    names = task.answer.split()
    assert len(set(names)) == 5
    value = re.search(r"assigned the value (\d{5}),", text)
    assert value
    chain = [value[1], *(f"VAR {name}" for name in names)]
    places = [text.index(f" VAR {name} = {held}.") for name, held in zip(names, chain)]
    assert places == sorted(places)
    assert text.endswith(f"they are:{task.answer}")


INSERTED = re.compile(r" The special magic number for \w+ is \d{7}\.| VAR \w{5} = [\w ]+\.")
"""The inserted sentences of both kinds."""


def inserted(text: str, kind: Kind) -> list[re.Match[str]]:
    """Returns the inserted sentences, and checks their number."""
    matches = list(INSERTED.finditer(text))
    assert len(matches) == (1 if kind == "needle" else 5)
    return matches


@given(
    kind=st.sampled_from(["needle", "variables"]),
    seed=st.integers(0, 2**63 - 1),
    length=st.integers(700, 3000),
    depth=st.integers(0, 100),
    sample=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_every_task(kind: Kind, seed: int, length: int, depth: int, sample: int) -> None:
    numbers = {"seed": seed, "length": length, "depth": depth, "sample": sample}
    task = make_task(kind, HAYSTACK, encode, **numbers)
    assert task.length == length
    assert decode(task.tokens[task.answer_start :]) == task.answer
    text = decode(task.tokens)
    hidden = inserted(text, kind)
    whole = INSERTED.sub("", text)
    again = make_task(kind, HAYSTACK, encode, **numbers)
    assert np.array_equal(task.tokens, again.tokens)
    other = make_task(kind, HAYSTACK, encode, **{**numbers, "sample": sample + 1})
    assert not np.array_equal(task.tokens, other.tokens)
    if kind == "needle":
        head = whole.index("\n") + 1
        size = whole.index("\nWhat") - head
        longest = int(np.diff(HAYSTACK.borders).max())
        assert abs((hidden[0].start() - head) - depth * size / 100) <= longest / 2 + 1


@given(length=st.integers(120, 900), depth=st.integers(0, 100), sample=st.integers(0, 50))
@settings(max_examples=30)
def test_the_length_is_in_tokens_of_any_tokenizer(length: int, depth: int, sample: int) -> None:
    haystack = Haystack.of(TEXT, by_word)
    for kind in ("needle", "variables"):
        task = make_task(kind, haystack, by_word, seed=3, length=length, depth=depth, sample=sample)
        assert task.length == length
        assert np.array_equal(task.tokens[task.answer_start :], by_word(task.answer))
        text = text_of_words(task.tokens)
        hidden = inserted(text, kind)
        assert all(text[match.start() - 1] in ".!?\n" for match in hidden)
        assert text.endswith(task.answer)
        if kind == "needle":
            assert f"{task.answer}." in hidden[0][0]


def test_both_ends_are_depths() -> None:
    first, last = (
        make_task("needle", HAYSTACK, encode, seed=1, length=500, depth=depth) for depth in (0, 100)
    )
    assert decode(first.tokens).index("afterwards.\n The special magic number for")
    assert re.search(r"for \w+ is \d{7}\.\nWhat is", decode(last.tokens))


def test_a_window_repeats_the_text() -> None:
    haystack = Haystack(tokens=np.arange(5), borders=np.array([0, 2, 5]))
    tokens, places = haystack.window(9, 1)
    assert tokens.tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert places.tolist() == [0, 2, 4, 7, 9]


def test_sentences_are_never_long() -> None:
    assert sentences("A b.  C d!\n\nheading\n\nE") == [" A b.", " C d!", " heading", " E"]
    assert max(map(len, sentences("word " * 1000))) <= LONGEST_SENTENCE
    prose = sentences(library_prose())
    assert len(prose) > 1000


def test_a_length_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--lengths 100: needle needs \d+ tokens") as caught:
        make_task("needle", HAYSTACK, encode, seed=1, length=100)
    make_task("needle", HAYSTACK, encode, seed=1, length=int(caught.value.works))
    with pytest.raises(ConfigError, match="no sentence"):
        Haystack.of(" \n ", encode)
