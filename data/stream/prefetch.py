"""Items made by a thread while the consumer works on those before: the same items, at most so many waiting.

An error of the thread is raised where its item would have come. A thread that is slow or dead is an error that says
what it was doing, never a hang. Closing the generator ends the thread.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kd_core.errors import UsageError

T = TypeVar("T")
PATIENCE = 60.0  # seconds for a thread to end once it was told to
GRACE = 5.0  # the same, for one that was too slow already
LOOK_EVERY = 1.0  # seconds between looks at whether the thread lives


@dataclass
class _Shared(Generic[T]):
    """What both threads see; `changed` guards all of it."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    ready: deque[T] = field(default_factory=deque[T])
    error: BaseException | None = None
    ended: bool = False
    stopped: bool = False


def _work(items: Generator[T], depth: int, shared: _Shared[T]) -> None:
    """Make items as long as there is room for them."""
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


def ahead(
    items: Generator[T], depth: int, timeout: float, doing: Callable[[], str], stop: Callable[[], None]
) -> Generator[T]:
    """The items, made by a thread.

    Args:
        items: what to go through; none of them is None.
        depth: so many items may wait, at least 1.
        timeout: seconds to wait for one.
        doing: what the thread is at, in words.
        stop: makes whatever the thread waits for come to an end.

    Raises:
        UsageError: the thread took longer than `timeout`, or died without an error.
    """
    shared = _Shared[T]()
    thread = threading.Thread(target=_work, args=(items, depth, shared), name="reading ahead", daemon=True)
    thread.start()
    patience = min(timeout, PATIENCE)  # the item that is under way may take long
    try:
        while True:
            started = time.monotonic()
            with shared.changed:
                while not (shared.ready or shared.ended):
                    shared.changed.wait(min(LOOK_EVERY, timeout))
                    waited = time.monotonic() - started
                    if not (shared.ready or shared.ended) and (waited >= timeout or not thread.is_alive()):
                        how, patience = "is still at" if thread.is_alive() else "died at", GRACE
                        raise UsageError(
                            f"waited {waited:.0f} s for data; the reader {how} {doing()}. Look at the disk or server "
                            f"that it lies on, or raise shards.timeout ({timeout:g} s)."
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
            thread.join(patience)  # in torch's code while Python ends, it would abort the process
