"""Needle tasks: a literal one, and what holds for every one of them."""

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
    Task,
    library_prose,
    make_task,
    sentences,
)

TEXT = "One fish. Two fish are here. Red fish! Blue fish swim far away, or do they? Yes."
encode, decode = ByteTokenizer().encode, ByteTokenizer().decode
HAYSTACK = Haystack.of(TEXT, encode)


def by_word(text: str) -> npt.NDArray[np.int64]:
    """Another tokenizer: one token per word or other sign, from a hash that keeps it readable."""
    return np.array([sum(map(ord, word)) + 1000 for word in re.findall(r" ?\w+|\W", text)])


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


def without_inserted(task: Task) -> str:
    text = decode(task.tokens)
    for sentence in task.inserted:
        assert text.count(sentence) == 1, sentence
        text = text.replace(sentence, "")
    return text


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
    for place, sentence in zip(task.places, task.inserted, strict=True):
        assert decode(task.tokens[place:]).startswith(sentence)
    whole = without_inserted(task)
    again = make_task(kind, HAYSTACK, encode, **numbers)
    assert np.array_equal(task.tokens, again.tokens)
    other = make_task(kind, HAYSTACK, encode, **{**numbers, "sample": sample + 1})
    assert not np.array_equal(task.tokens, other.tokens)
    if kind == "needle":
        head = whole.index("\n") + 1
        room = whole.index("\nWhat") - head
        longest = int(np.diff(HAYSTACK.borders).max())
        assert abs((task.places[0] - head) - depth * room / 100) <= longest / 2 + 1


@given(length=st.integers(120, 900), depth=st.integers(0, 100), sample=st.integers(0, 50))
@settings(max_examples=30)
def test_the_length_is_in_tokens_of_any_tokenizer(length: int, depth: int, sample: int) -> None:
    haystack = Haystack.of(TEXT, by_word)
    for kind in ("needle", "variables"):
        task = make_task(kind, haystack, by_word, seed=3, length=length, depth=depth, sample=sample)
        assert task.length == length
        assert np.array_equal(task.tokens[task.answer_start :], by_word(task.answer))
        for place, sentence in zip(task.places, task.inserted, strict=True):
            tokens = by_word(sentence)
            assert np.array_equal(task.tokens[place : place + len(tokens)], tokens)


def test_both_ends_are_depths() -> None:
    first, last = (
        make_task("needle", HAYSTACK, encode, seed=1, length=500, depth=depth) for depth in (0, 100)
    )
    assert decode(first.tokens).index("afterwards.\n The special magic number for")
    assert re.search(r"for \w+ is \d{7}\.\nWhat is", decode(last.tokens))


def test_a_window_goes_round_and_round() -> None:
    haystack = Haystack(tokens=np.arange(5), borders=np.array([0, 2, 5]))
    tokens, places = haystack.window(9, 1)
    assert tokens.tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert places.tolist() == [0, 2, 4, 7, 9]


def test_sentences_are_never_long() -> None:
    assert sentences("A b.  C d!\n\nheading\n\nE") == [" A b.", " C d!", " heading", " E"]
    assert max(map(len, sentences("word " * 1000))) <= LONGEST_SENTENCE
    prose = sentences(library_prose())
    assert len(prose) > 1000


def test_too_short_a_length_is_told() -> None:
    with pytest.raises(ConfigError, match=r"--lengths 100: needle needs \d+ tokens") as caught:
        make_task("needle", HAYSTACK, encode, seed=1, length=100)
    make_task("needle", HAYSTACK, encode, seed=1, length=int(caught.value.works))
    with pytest.raises(ConfigError, match="no sentence"):
        Haystack.of(" \n ", encode)
