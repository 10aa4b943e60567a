"""The number of rows of each segment of a cache, counted once and kept in a file of the user's cache folder.

    CACHE_HOME/kd-workspace/rows/IDENTITY-ROW_LENGTH-VERSION     sha256 of the rest, then an int32 for each segment

A file that is damaged or of another cache is not used, and written again. Small caches are counted at each start.
"""

import hashlib
import logging
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.cache.indexes.lengths import Array
from data.cache.manifest import Manifest
from data.stream.order import ORDER_VERSION, pack_segment
from data.stream.segments import Segments, count_side_by_side
from kd_core.errors import UsageError
from kd_core.files import cache_home, open_plain, write_bytes

log = logging.getLogger("kd")
FEW_SEGMENTS = 64  # segments that are counted faster one by one
KEPT_FROM = 1_000_000  # records of a cache whose counts are kept
DIGEST_BYTES = 32
LOG_SECONDS = 10.0


def counts_file(manifest: Manifest, row_length: int) -> Path:
    """Returns the file that keeps the counts of a cache at one row length."""
    return cache_home() / "rows" / f"{manifest.identity()}-{row_length}-{ORDER_VERSION}"


def count_rows(manifest: Manifest, row_length: int) -> tuple[Segments, Array]:
    """Returns the segments of a cache at a row length, and the number of rows of each.

    Raises:
        UsageError: a record is longer than a row.
    """
    segments = Segments.from_lengths(manifest.lengths, row_length)
    if len(manifest.lengths.records) < KEPT_FROM:
        return segments, _count(manifest, segments, row_length)
    path = counts_file(manifest, row_length)
    if (counts := _read(path, manifest, segments, row_length)) is None:
        counts = _count(manifest, segments, row_length)
        _write(path, counts)
    return segments, counts


def _count(manifest: Manifest, segments: Segments, row_length: int) -> Array:
    lengths = manifest.lengths
    if len(segments) < FEW_SEGMENTS:
        edges = lengths.block_starts[segments.window_starts]
        runs = zip(segments.starts[:-1].tolist(), segments.starts[1:].tolist(), strict=True)
        windows = [edges[first : last + 1] for first, last in runs]
        return np.array([len(pack_segment(lengths, window, row_length, None)) for window in windows], np.int64)
    chunks, counted, logged = list[Array](), 0, time.monotonic()
    for chunk in count_side_by_side(lengths, segments, row_length):
        chunks.append(chunk)
        counted += len(chunk)
        if time.monotonic() - logged > LOG_SECONDS:
            log.info("rows of the cache are counted, once: %.0f%%", 100 * counted / len(segments))
            logged = time.monotonic()
    return np.concatenate(chunks)


def _read(path: Path, manifest: Manifest, segments: Segments, row_length: int) -> Array | None:
    """Returns the counts in a file, or None where there are none that fit the cache."""
    size = DIGEST_BYTES + 4 * len(segments)
    with suppress(OSError, UsageError), open_plain(path, "the numbers of rows of a cache") as file:
        data = file.read(size + 1)
        if len(data) != size or hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
            return None
        counts = np.frombuffer(data, "<i4", offset=DIGEST_BYTES).astype(np.int64)
        # A segment has at least the rows that its positions fill, and at most one for each record.
        blocks = segments.window_starts[segments.starts]
        positions, records = manifest.lengths.position_starts()[blocks], manifest.lengths.block_starts[blocks]
        if (counts * row_length >= np.diff(positions)).all() and (counts <= np.diff(records)).all():
            return counts
    return None


def _write(path: Path, counts: Array) -> None:
    """Writes the counts, whole or not at all. Several processes may write the same file at once."""
    payload = counts.astype("<i4").tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            write_bytes(Path(folder) / "counts", hashlib.sha256(payload).digest() + payload)
            (Path(folder) / "counts").rename(path)
    except OSError as error:
        log.info("%s: not written (%s), so the next start counts the rows again", path, error)
