"""The positions of every record of a cache, as arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class CacheLengths:
    """Positions of R records in stored order, and where blocks and shards begin.

    Args:
        records: positions of each record.  [R]
        block_starts: first record of each block, and R.  [blocks + 1]
        shard_starts: first block of each shard, and their number in all.  [shards + 1]
    """

    records: Array
    block_starts: Array
    shard_starts: Array
