"""Windows of an export on local disk, written as the corpus is tokenised and read by every rank of a host.

    SPOOL/KEY/
      begin.json           what the first texts decide: estimates and rates of a long corpus
      000000.part …        windows of both caches, in order, as safetensors; the state of the pass behind them
      end.json             totals, or failed.json: the message of the error that ended the pass

Each file appears by rename. So what is there is complete, and a pass that was interrupted goes on behind the last part.
"""

import bisect
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from data.cache.contents import windows_digest
from data.corpus.windows import Array, Window
from data.export.spool.spool_parts import Part, open_part, part_path
from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, is_owned, read_json

BEGIN_FILE, END_FILE, FAILED_FILE = "begin.json", "end.json", "failed.json"
POLL_SECONDS = 0.05
# Seconds that a spool without its writer may stand still. A writer takes some to start, and minutes on a busy host.
OWNERLESS_SECONDS = 300.0
LOADED_PARTS = 4  # parts that a reader keeps in memory, of some 5 MB each


class SpoolWindows(Sequence[Window]):
    """The windows of one cache in a spool, which may still be growing.

    Memory does not grow with the corpus: tokens of `LOADED_PARTS` parts, and a number for each part. Several threads
    may read at once. What needs all windows waits for the end of the pass.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self._firsts = [0]  # the number of the first window of each part seen so far, and of the next one
        self._loaded: OrderedDict[int, Part] = OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return SpoolWindows, (self.folder, self.split)

    def _part_positions(self, number: int) -> Array:
        path = part_path(self.folder, number)
        with damage_as_usage_error(path, "a part of a spool", "Delete the spool"), open_part(path) as part:
            return part.get_tensor(f"{self.split}.positions")

    def _see_part(self, number: int) -> bool:
        """Waits for a part, and returns False where the pass ended before it.

        Raises:
            UsageError: the pass failed, or its process ended.
        """
        waits_from = time.monotonic()
        while not part_path(self.folder, number).exists():
            is_complete, failure = (self.folder / END_FILE).exists(), self.folder / FAILED_FILE
            if is_complete or failure.exists():
                # The end may have appeared just behind the part.
                if is_complete or part_path(self.folder, number).exists():
                    return part_path(self.folder, number).exists()
                raise UsageError(str(read_json(failure, "the error of a spool")["message"]))
            if is_owned(self.folder):
                waits_from = time.monotonic()
            elif time.monotonic() - waits_from > OWNERLESS_SECONDS:
                raise UsageError(
                    f"{self.folder}: the process that tokenizes the corpus has ended. Run the same command again; it "
                    "goes on with what is done."
                )
            time.sleep(POLL_SECONDS)
        return True

    def part_positions(self) -> Iterator[Array]:
        """Yields the positions of each part's windows, as parts appear."""
        number = 0
        while self._see_part(number):
            positions = self._part_positions(number)
            with self._lock:
                if number + 1 == len(self._firsts):
                    self._firsts.append(self._firsts[-1] + len(positions))
            yield positions
            number += 1

    def each_positions(self) -> Iterator[int]:
        """Yields the positions of each window, as windows appear."""
        for positions in self.part_positions():
            yield from positions.tolist()

    @cached_property
    def positions(self) -> Array:
        """Returns the positions of all windows, int32 [R]. Waits for the end of the pass."""
        return np.concatenate([np.zeros(0, np.int32), *self.part_positions()])

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Window]:
        for number, positions in enumerate(self.part_positions()):
            yield from (self._part(number).window(i) for i in range(len(positions)))

    def _part(self, number: int) -> Part:
        with self._lock:
            if number not in self._loaded:
                self._loaded[number] = Part(part_path(self.folder, number), self.split)
                if len(self._loaded) > LOADED_PARTS:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(number)
            return self._loaded[number]

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index += len(self) if index < 0 else 0
        self._see_window(index)
        part = bisect.bisect_right(self._firsts, index) - 1
        return self._part(part).window(index - self._firsts[part])

    def _see_window(self, index: int) -> None:
        """Waits for the part that has a window.

        Raises:
            IndexError: there is none.
        """
        if index >= self._firsts[-1]:
            # Look on until a part has the window.
            next((None for _ in self.part_positions() if index < self._firsts[-1]), None)
            if index >= self._firsts[-1]:
                raise IndexError(index)

    def _column(self, name: str, windows: range) -> Array:
        """Returns a column of consecutive windows, [n, values a window], and reads no other column of their parts."""
        self._see_window(windows.stop - 1)
        first = bisect.bisect_right(self._firsts, windows.start) - 1
        last = bisect.bisect_right(self._firsts, windows.stop - 1) - 1
        columns: list[Array] = []
        for number in range(first, last + 1):
            start, stop = self._firsts[number : number + 2]
            if start == stop:
                continue  # all windows of the part are of the other cache
            path = part_path(self.folder, number)
            with damage_as_usage_error(path, "a part of a spool", "Delete the spool"), open_part(path) as part:
                column = part.get_tensor(f"{self.split}.{name}").reshape(stop - start, -1)
            columns.append(column[max(0, windows.start - start) : windows.stop - start])
        return np.concatenate(columns)

    def positions_of(self, windows: range) -> Array:
        """Returns the positions of consecutive windows, int32 [n]. Waits for these alone."""
        return self._column("positions", windows)[:, 0]

    def sha256_of(self, windows: range) -> str:
        """Returns the sha256 over consecutive windows and their masks, as an index has it. Waits for these alone."""
        # 16 bytes of each window, 16 of its mask.  [n, 32]
        digests = np.concatenate([self._column(name, windows) for name in ("digests", "mask_digests")], axis=1)
        return windows_digest([digests.tobytes()])

    def identity(self) -> dict[str, Any]:
        """Returns the number of windows, and the hashes over them and over their masks. Waits for the end."""
        identity: dict[str, Any] = {
            "windows": {"number": len(self), "sha256": windows_digest(self._all("digests"))},
            "windows_masks": windows_digest(self._all("mask_digests")),
        }
        # Only where the teacher reads other contexts, so that all other plans stay as they were.
        if self._has_contexts():
            identity["windows_contexts"] = windows_digest(
                itertools.chain(self._all("context_sizes"), self._all("contexts"))
            )
        return identity

    def _has_contexts(self) -> bool:
        return any(sizes.strip(b"\xff") for sizes in self._all("context_sizes"))  # −1 is four bytes of 255

    def _all(self, name: str) -> Iterator[bytes]:
        for number, _ in enumerate(self.part_positions()):
            with open_part(part_path(self.folder, number)) as part:
                yield part.get_tensor(f"{self.split}.{name}").tobytes()

    def end(self) -> dict[str, Any]:
        """Returns the totals of the pass, and waits for them."""
        len(self)
        return read_json(self.folder / END_FILE, "the totals of a spool")
