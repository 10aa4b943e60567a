"""Work in processes beside this one, with results in the order of the work."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from kd_core.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(executor: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yields results of `work` in the order of `items`, with at most `ahead` items begun beyond the one yielded."""
    begun: deque[Future[R]] = deque()
    for item in items:
        begun.append(executor.submit(work, item))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _begin(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Prepares a process. It ends with its parent, also where that is killed."""
    # Ctrl-C reaches every process of the terminal. This one ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    prepare(*arguments)


class OrderedMap:
    """A map over items, in this process or in processes beside it. Results come in the order of the items."""

    def __init__(self, executor: Executor | None, ahead: int) -> None:
        self.executor, self.ahead = executor, ahead

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yields `work(item)` of each item.

        Raises:
            UsageError: `work` raises it, or a process ended.
        """
        if self.executor is None:
            yield from map(work, items)
            return
        try:
            yield from map_in_order(self.executor, work, items, self.ahead)
        except BrokenProcessPool:
            raise UsageError(
                "a process beside this one ended, as where memory runs out. Run the same command again to go on, with "
                "fewer --processes."
            ) from None


@contextlib.contextmanager
def ordered_map(processes: int, prepare: Callable[..., None], *arguments: Any) -> Generator[OrderedMap]:
    """Yields a map over `processes` processes, or over this one where that is 1.

    `prepare(*arguments)` is called once in each process before its first item.
    """
    if processes == 1:
        prepare(*arguments)
        yield OrderedMap(None, 0)
        return
    executor = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(prepare, arguments)
    )
    try:
        yield OrderedMap(executor, 2 * processes)
    finally:
        executor.shutdown(cancel_futures=True)
