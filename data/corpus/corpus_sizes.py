"""Sizes of corpora as they are read, and fingerprints: both in seconds, whatever a corpus holds."""

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from data.corpus.table_rows import table_bytes
from data.text_lines import DAMAGE, PACKED
from kd_core.files import content_fingerprint

MOST_HASHED = 1 << 32  # bytes of a corpus that are hashed as a whole, which takes seconds
SAMPLED_BYTES = 1 << 20  # of each file of a larger one, at its beginning, in its middle and at its end
PROBED_BYTES, MOST_UNPACKED = 1 << 16, 1 << 24


def _packing_ratio(path: Path) -> float:
    """Returns how many bytes the first ones of a packed file unpack to, for each of them."""
    with path.open("rb") as file:
        packed, unpacked = file.read(PROBED_BYTES), 0
    with contextlib.suppress(*DAMAGE, OSError):  # it is cut off
        stream = PACKED[path.suffix.lower()](io.BytesIO(packed))
        while unpacked < MOST_UNPACKED and (chunk := stream.read(1 << 12)):
            unpacked += len(chunk)
    return max(1.0, unpacked / max(1, len(packed)))


def estimate_bytes(paths: Sequence[Path]) -> int:
    """Returns about how many bytes the files have, unpacked."""
    total = 0.0
    for path in paths:
        packing = _packing_ratio(path) if path.suffix.lower() in PACKED else 1.0
        total += table_bytes(path) if path.suffix.lower() == ".parquet" else packing * path.stat().st_size
    return round(total)


def corpus_fingerprint(paths: list[Path]) -> str:
    """Returns one sha256 over the files of a corpus.

    It goes over all names and bytes of a corpus of at most `MOST_HASHED` bytes, and of a larger one over names, sizes
    and three pieces of each file. The digests of its windows stand for the rest.
    """
    if sum(path.stat().st_size for path in paths) <= MOST_HASHED:
        return content_fingerprint(paths)
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(os.fsencode(path.name) + f" {size}\n".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - SAMPLED_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLED_BYTES))
    return f"sampled {digest.hexdigest()}"
