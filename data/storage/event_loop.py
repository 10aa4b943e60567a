"""One event loop for all transfers of this process, in a thread that ends before the interpreter does."""

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from kd_core.errors import UsageError

T = TypeVar("T")
JOIN_SECONDS = 5.0


class _LoopThread:
    """A thread that runs an event loop. A forked child has neither this thread nor those of the client library."""

    def __init__(self) -> None:
        self.loop, self.process = asyncio.new_event_loop(), os.getpid()
        self.thread = threading.Thread(target=self.loop.run_forever, name="transfers", daemon=True)
        self.thread.start()
        atexit.register(self.end)

    def end(self) -> None:
        """Cancels all transfers and ends the thread."""
        if self.process != os.getpid():
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result(JOIN_SECONDS)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(JOIN_SECONDS)


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


_starting = threading.Lock()
_running: list[_LoopThread] = []


def submit(coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
    """Starts a coroutine on the process's event loop. Cancelling the future cancels the coroutine.

    Raises:
        UsageError: the process was forked after its parent had read from a URL.
    """
    with _starting:
        if not _running:
            _running.append(_LoopThread())
    if _running[0].process != os.getpid():
        coroutine.close()
        raise UsageError(
            "a forked process cannot read from a URL after its parent did. Start processes by `spawn` or `forkserver`."
        )
    return asyncio.run_coroutine_threadsafe(coroutine, _running[0].loop)
