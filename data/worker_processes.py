"""Processes that do one kind of work beside this one, a job at a time, with results in the order of the jobs.

    jobs ─ pickle ─► a process: work(job) ─ pickle ─► results, in order

A process reads jobs from its standard input until that ends. So it ends too where its parent was killed.
"""

import contextlib
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from subprocess import Popen
from typing import IO, Any, Generic, TypeVar

from kd_core.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")
# Seconds in which a process must end after its results have.
PATIENCE = 10.0

MapJobs = Callable[[Iterable[T]], Iterator[R]]
"""Does jobs and yields their results in order."""


def start_process(module: str, *arguments: str, pass_fds: Sequence[int] = (), **variables: str) -> Popen[bytes]:
    """Starts a module as a process that imports what this one can, with a pipe as its standard input.

    What anything prints in it goes to standard error. `variables` are set in its environment.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    command = [sys.executable, "-m", module, *arguments]
    return Popen(command, stdin=subprocess.PIPE, stdout=2, env=environment, pass_fds=pass_fds)


class WorkerProcess(Generic[T, R]):
    """A process that does one job at a time."""

    def __init__(self, work: Callable[[T], R], describe: Callable[[T], str]) -> None:
        """Starts the process.

        Args:
            work: what is done with a job. It is pickled with all that it is bound to.
            describe: begins the message where the process ends in the middle of a job.
        """
        reading, writing = os.pipe()  # results have a pipe of their own
        self._results = os.fdopen(reading, "rb")
        try:
            # One thread each: processes stand beside each other as they are.
            self._process = start_process(__name__, str(writing), pass_fds=[writing], RAYON_NUM_THREADS="1")
        finally:
            os.close(writing)
        self._work, self._describe, self._is_begun = work, describe, False

    def run(self, job: T) -> R:
        """Returns the result of a job.

        Raises:
            UsageError: the work raised it, or the process has ended.
        """
        process = self._process
        assert process.stdin
        try:
            # The work goes first. It is sent with the first job, so that starting a process waits for nothing.
            if not self._is_begun:
                pickle.dump(self._work, process.stdin, protocol=5)
                self._is_begun = True
            pickle.dump(job, process.stdin, protocol=5)
            process.stdin.flush()
            result, error = pickle.load(self._results)  # noqa: S301 (a pipe to our own process)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise UsageError(
                f"{self._describe(job)} ended with {self._status()}. Run the same command again; it goes on with this."
            ) from None
        if error is not None:
            raise UsageError(error)
        return result

    def _status(self) -> str:
        """Returns how the process ended, and kills it where it still runs a while after its results broke off."""
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"results that cannot be read, and was killed with status {self._process.wait()}"
        if status == -signal.SIGKILL:
            return f"status {status}: it was killed, as where memory runs out"
        return f"status {status}. Its own message is above"

    def kill(self) -> None:
        """Ends the process in the middle of a job."""
        self._process.kill()

    def end(self) -> None:
        """Ends the process at the end of its input, and frees its pipes."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin
            self._process.stdin.close()
        self._process.wait()
        self._results.close()


def map_in_order(executor: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yields results of `work` in the order of `items`, with at most `ahead` items begun beyond the one yielded."""
    begun: deque[Future[R]] = deque()
    for item in items:
        begun.append(executor.submit(work, item))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


@contextlib.contextmanager
def worker_processes(work: Callable[[T], R], describe: Callable[[T], str], processes: int) -> Generator[MapJobs[T, R]]:
    """Yields a function that does jobs: as results are asked for, or ahead of that in so many `processes`.

    The results are the same.
    """
    if not processes:
        yield lambda jobs: map(work, jobs)
        return
    workers = [WorkerProcess(work, describe) for _ in range(processes)]
    idle: queue.SimpleQueue[WorkerProcess[T, R]] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(job: T) -> R:
        worker = idle.get()
        try:
            return worker.run(job)
        finally:
            idle.put(worker)

    # A thread for each process waits for its pipes. As many jobs again are ready for the process that is done first.
    executor = ThreadPoolExecutor(processes)
    try:
        yield lambda jobs: map_in_order(executor, run, jobs, ahead=2 * processes)
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        for worker in workers:
            worker.end()


def _serve(jobs: IO[bytes], results: IO[bytes]) -> None:
    """Does jobs until their pipe ends. A result is (result, None), or (None, message) of a `UsageError`."""
    work: Callable[[Any], Any] = pickle.load(jobs)  # noqa: S301 (a pipe to our own parent)
    while True:
        try:
            result = work(pickle.load(jobs)), None  # noqa: S301
        except EOFError:
            return
        except UsageError as error:
            result = None, str(error)
        pickle.dump(result, results, protocol=5)
        results.flush()


if __name__ == "__main__":
    # Ctrl-C reaches every process of the terminal. This one ends with its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # the process that began has already logged them
    with (
        contextlib.suppress(BrokenPipeError, EOFError, pickle.UnpicklingError),
        os.fdopen(int(sys.argv[1]), "wb") as results_pipe,
    ):
        _serve(sys.stdin.buffer, results_pipe)
