"""What every stage of reading that has a state must keep: `check_stage` for a stage started at any cursor."""

import os
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from typing import TypeVar

import torch

from kd_core.types import Batch
from tests.forks import child_processes

T = TypeVar("T")


def _open_now() -> tuple[set[str], int, set[str]]:
    """Names of threads but those of a test's web server, number of open files, children."""
    names = {thread.name for thread in threading.enumerate()}
    threads = {name for name in names if "process_request_thread" not in name}
    return threads, len(os.listdir("/proc/self/fd")), child_processes()  # noqa: PTH208 (counts itself too)


def check_stage(start: Callable[[int], Generator[T]], same: Callable[[T, T], bool], items: int) -> None:
    """The stage is a function of its cursor, and leaves nothing behind.

    Args:
        start: the stage from item n on; `items` and more of them.
        same: whether two items are equal.
        items: how many to compare.
    """
    before = _open_now()

    def some(cursor: int) -> list[T]:
        with closing(start(cursor)) as stage:
            return list(islice(stage, items - cursor))

    whole = some(0)
    assert len(whole) == items
    for cursor in (0, 1, items // 2, items - 1):
        tail = some(cursor)
        assert len(tail) == items - cursor
        for number, (one, other) in enumerate(zip(tail, whole[cursor:], strict=True)):
            assert same(one, other), f"begun at {cursor}, item {cursor + number} is another"
    for taken in range(3):
        stage = start(0)
        list(islice(stage, taken))
        stage.close()
        # Fewer than before is fine: connections of earlier tests close when they have been idle for a while.
        threads, files, processes = _open_now()
        is_clean = threads == before[0] and files <= before[1] and processes == before[2]
        now = threads, files, processes
        assert is_clean, f"closed after {taken} items, it leaves threads, files or processes: {before}, now {now}"


def same_step(one: list[Batch], other: list[Batch]) -> bool:
    """Whether two steps hold the same, to the bit."""
    fields = [name for name, value in vars(one[0]).items() if isinstance(value, torch.Tensor)]
    return len(one) == len(other) and all(
        (a.record_names, a.damaged_blocks) == (b.record_names, b.damaged_blocks)
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in fields)
        for a, b in zip(one, other, strict=True)
    )
