"""Encoding of blocks, in this process or in processes beside it.

    blocks of records ─ pickle ─► a process: encode_block_members ─► bytes of a tar, in the order of the blocks

Beside a GPU, a thread that encodes would hold the interpreter's lock while the thread that feeds the GPU waits for it.
A process reads blocks from its standard input until that ends. So it ends too where its parent was killed.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple

from data.cache.codec.block import encode_block_members
from data.cache.codec.coding import Coding
from data.cache.record import Record
from data.parallel import map_in_order
from kd_core.errors import UsageError

# Seconds in which a process must end after its results have.
PATIENCE = 10.0


class BlockJob(NamedTuple):
    """A block to encode: its records, the number of the first of them, and the shard that it is for."""

    shard: str
    first: int
    records: Sequence[Record]


class EncoderSettings(NamedTuple):
    """Settings of `encode_block_members` that all blocks of a cache share."""

    coding: Coding
    max_kl: float

    def encode(self, job: BlockJob) -> bytes:
        """Encodes a block.

        Raises:
            UsageError: a record holds values that no teacher can produce, or the codec's error is above the bound.
        """
        try:
            return encode_block_members(job.first, job.records, self.coding, self.max_kl)
        except ValueError as error:
            raise UsageError(f"{job.shard}: {error}") from None


Encode = Callable[[Iterable[BlockJob]], Iterator[bytes]]
"""Encodes blocks and yields their bytes in order."""


class _EncoderProcess:
    """A process that encodes one block at a time."""

    def __init__(self, settings: EncoderSettings) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # Results have a pipe of their own. What anything prints in the process goes to standard error.
        reading, writing = os.pipe()
        self._results = os.fdopen(reading, "rb")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(writing)], stdin=subprocess.PIPE, stdout=2, env=environment,
                pass_fds=[writing],
            )  # fmt: skip
        finally:
            os.close(writing)
        self._settings = settings
        self._is_begun = False

    def encode(self, job: BlockJob) -> bytes:
        """Encodes a block as `EncoderSettings.encode` does.

        Raises:
            UsageError: as there, or the process has ended.
        """
        process = self._process
        assert process.stdin
        try:
            # Settings go first. They are sent by the first job, so that starting a process waits for nothing.
            if not self._is_begun:
                pickle.dump(tuple(self._settings), process.stdin, protocol=5)
                self._is_begun = True
            pickle.dump(tuple(job), process.stdin, protocol=5)
            process.stdin.flush()
            encoded, error = pickle.load(self._results)  # noqa: S301 (a pipe to our own process)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise UsageError(
                f"{job.shard}: the process that encoded its blocks ended with {self._status()}. "
                "Run the same command again; it goes on with this shard."
            ) from None
        if error is not None:
            raise UsageError(error)
        return encoded

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
        """Ends the process in the middle of a block."""
        self._process.kill()

    def end(self) -> None:
        """Ends the process at the end of its input, and frees its pipes."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin
            self._process.stdin.close()
        self._process.wait()
        self._results.close()


@contextlib.contextmanager
def block_encoders(settings: EncoderSettings, processes: int) -> Generator[Encode]:
    """Yields a function that encodes blocks: as they are asked for, or ahead of that in so many `processes`.

    The bytes are the same.
    """
    if not processes:
        yield lambda jobs: map(settings.encode, jobs)
        return
    encoders = [_EncoderProcess(settings) for _ in range(processes)]
    idle: queue.SimpleQueue[_EncoderProcess] = queue.SimpleQueue()
    for encoder in encoders:
        idle.put(encoder)

    def encode(job: BlockJob) -> bytes:
        encoder = idle.get()
        try:
            return encoder.encode(job)
        finally:
            idle.put(encoder)

    # A thread for each process waits for its pipes. As many blocks again are ready for the process that is done first.
    executor = ThreadPoolExecutor(processes)
    try:
        yield lambda jobs: map_in_order(executor, encode, jobs, ahead=2 * processes)
    except BaseException:
        for encoder in encoders:
            encoder.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        for encoder in encoders:
            encoder.end()


def _serve(jobs: IO[bytes], results: IO[bytes]) -> None:
    """Encodes blocks until `jobs` ends. A result is (bytes, None), or (None, message) of a `UsageError`."""
    settings: EncoderSettings | None = None
    while True:
        try:
            values = pickle.load(jobs)  # noqa: S301 (a pipe to our own parent)
        except EOFError:
            return
        if settings is None:
            settings = EncoderSettings(*values)
            continue
        result: tuple[bytes | None, str | None]
        try:
            result = settings.encode(BlockJob(*values)), None
        except UsageError as error:
            result = None, str(error)
        pickle.dump(result, results, protocol=5)
        results.flush()


if __name__ == "__main__":
    # Ctrl-C reaches every process of the terminal. This one ends with its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError), os.fdopen(int(sys.argv[1]), "wb") as results:
        _serve(sys.stdin.buffer, results)
