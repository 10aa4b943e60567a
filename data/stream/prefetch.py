"""Prefetching: a thread makes the next items while the consumer works, with a bounded number of items waiting.

The items and their order stay the same. An error of the thread is raised where its item would have come. A thread that
is slow or dead never hangs the consumer: an error names what the thread was doing. Closing the generator ends the
thread.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kd_core.errors import UsageError

T = TypeVar("T")
JOIN_SECONDS = 60.0  # most seconds to wait for the thread to end after it was stopped
GRACE = 5.0  # the same, for a thread that was already too slow
LOOK_EVERY = 1.0  # seconds between checks that the thread is alive


@dataclass
class _Shared(Generic[T]):
    """State that both threads share, guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    ready: deque[T] = field(default_factory=deque[T])
    error: BaseException | None = None
    ended: bool = False
    stopped: bool = False


def _work(items: Generator[T], depth: int, shared: _Shared[T]) -> None:
    """Makes items while there is room for them, in the reading thread."""
    try:
        while True:
            with shared.changed:
                shared.changed.wait_for(lambda: len(shared.ready) < depth or shared.stopped)
                if shared.stopped:
                    return
            item = next(items, None)
            if item is None:
                return
            with shared.changed:
                shared.ready.append(item)
                shared.changed.notify_all()
    except BaseException as error:
        shared.error = error
    finally:
        try:
            items.close()
        finally:
            with shared.changed:
                shared.ended = True
                shared.changed.notify_all()


def prefetch(
    items: Generator[T], depth: int, timeout: float, describe_work: Callable[[], str], stop: Callable[[], None]
) -> Generator[T]:
    """Yields the items, which a thread makes ahead of their use.

    Args:
        items: the generator to read. None of its items is None.
        depth: most items that wait, at least 1.
        timeout: seconds to wait for one item.
        describe_work: returns what the thread is reading, for error messages.
        stop: ends whatever the thread waits for, such as a transfer.

    Raises:
        UsageError: the thread took longer than `timeout`, or died without an error.
    """
    shared = _Shared[T]()
    thread = threading.Thread(target=_work, args=(items, depth, shared), name="reading ahead", daemon=True)
    thread.start()
    patience = min(timeout, JOIN_SECONDS)  # the item that is being made may take long
    try:
        while True:
            started = time.monotonic()
            with shared.changed:
                while not (shared.ready or shared.ended):
                    shared.changed.wait(min(LOOK_EVERY, timeout))
                    waited = time.monotonic() - started
                    if not (shared.ready or shared.ended) and (waited >= timeout or not thread.is_alive()):
                        state, patience = "is still at" if thread.is_alive() else "died at", GRACE
                        raise UsageError(
                            f"waited {waited:.0f} s for data; the reader {state} {describe_work()}. Check the disk or "
                            f"server that holds it, or raise shards.timeout ({timeout:g} s)."
                        )
                if not shared.ready:
                    break
                item = shared.ready.popleft()
                shared.changed.notify_all()
            yield item
        if shared.error is not None:
            raise shared.error
    finally:
        with shared.changed:
            shared.stopped = True
            shared.ready.clear()
            shared.changed.notify_all()
        if thread.is_alive():
            thread.join(0.2)
        if thread.is_alive():
            stop()
            thread.join(patience)  # a thread still inside torch while Python exits would abort the process
