"""Reading ahead: so many items and no more, every error with its cause, never a hang, nothing left behind."""

import threading
import time
from collections.abc import Generator
from contextlib import closing
from itertools import islice

import pytest

from data.stream.prefetch import prefetch
from kd_core.errors import UsageError
from tests.data.stream.contract import check_stage
from tests.patience import patience


def _nothing() -> None:
    pass


def _ahead(items: Generator[int], depth: int = 2, timeout: float = patience(5)) -> Generator[int]:
    return prefetch(items, depth, timeout, lambda: "block 7", _nothing)


def _count(start: int = 0) -> Generator[int]:
    while True:
        yield start
        start += 1


def test_it_keeps_the_contract() -> None:
    check_stage(lambda cursor: _ahead(_count(cursor)), lambda a, b: a == b, 40)


def test_no_more_than_its_depth_is_made_ahead() -> None:
    made = 0

    def items() -> Generator[int]:
        nonlocal made
        for item in _count():
            made = item + 1
            yield item

    with closing(_ahead(items(), 3)) as stage:
        for taken in range(1, 6):
            assert next(stage) == taken - 1
            deadline = time.monotonic() + patience(5)
            while made < taken + 3:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(0.05)
            assert made == taken + 3, "no more, though there was time"


def test_items_end_where_they_end() -> None:
    assert list(_ahead(i for i in range(5))) == list(range(5))


@pytest.mark.parametrize("error", [UsageError("shard 3 is damaged"), ValueError("cause"), KeyboardInterrupt()])
def test_an_error_comes_in_the_place_of_its_item(error: BaseException) -> None:
    def items() -> Generator[int]:
        yield from range(4)
        raise error

    stage = _ahead(items())
    assert list(islice(stage, 4)) == [0, 1, 2, 3]
    with pytest.raises(type(error)) as caught:
        next(stage)
    assert caught.value is error


def test_a_slow_reader_is_an_error_that_says_what_it_does() -> None:
    released = threading.Event()

    def items() -> Generator[int]:
        yield 1
        released.wait(patience(20))
        yield 2

    stage = prefetch(items(), 2, 0.2, lambda: "shard-000004.tar: block 7", released.set)
    assert next(stage) == 1
    with pytest.raises(UsageError, match=r"waited 0 s for data; the reader is still at shard-000004.tar: block 7"):
        next(stage)
    assert "reading ahead" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_without_a_word_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.stream.prefetch._work", lambda *_: None)
    monkeypatch.setattr("data.stream.prefetch.LOOK_EVERY", 0.05)
    with pytest.raises(UsageError, match="the reader died at block 7"):
        next(_ahead(_count()))
