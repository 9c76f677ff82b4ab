"""One item ahead in one thread: the same items and errors, and no thread remains."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cp_megatron.data.batch.ahead import Ahead


def ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_the_items_and_their_order_are_the_same() -> None:
    with Ahead(iter(range(5))) as ahead:
        assert list(ahead) == [0, 1, 2, 3, 4]
        assert list(ahead) == []
    with Ahead(iter(())) as empty:
        assert list(empty) == []


def test_exactly_the_next_item_is_made_meanwhile_in_one_thread() -> None:
    made: list[tuple[int, str]] = []
    ready = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number in range(4):
            made.append((number, threading.current_thread().name))
            ready[number].set()
            yield number

    with Ahead(items()) as ahead:
        for number in range(3):
            assert next(ahead) == number
            assert ready[number + 1].wait(10)
            time.sleep(0.01)
            assert len(made) == number + 2
    assert len({name for _, name in made}) == 1
    assert threading.current_thread().name not in {name for _, name in made}


def test_an_error_comes_where_the_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("row 1")

    with Ahead(items()) as ahead:
        assert next(ahead) == 0
        with pytest.raises(ValueError, match="row 1"):
            next(ahead)
    assert not ahead_threads()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_no_thread_remains_however_the_block_is_left(error: type[BaseException] | None) -> None:
    done: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            time.sleep(0.02)
            done.append(number)
            yield number

    try:
        with Ahead(items()) as ahead:
            next(ahead)
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    assert not ahead_threads()
    assert len(done) <= 2
