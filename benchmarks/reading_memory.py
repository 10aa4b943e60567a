"""How fast are batches read out of a cache on one core, and how much memory does that take?

Command:  OMP_NUM_THREADS=1 python -m benchmarks.reading_memory [shards] [prefetch]
Writes a synthetic cache (K = 64, blocks of 8,192 positions), reads one epoch of it verified, dealt from
lanes, packed and collated, and prints positions a second of the reader, with the time of each part, fill and memory.
"""

import resource
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from data.stream.collate import Collate
from data.stream.source import Shards
from data.stream.stream import training_steps
from tests.synthetic import write_cache

ROW_LENGTH, ROWS = 1024, 16


def resident_mb() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def read_epoch(folder: Path, prefetch: int) -> dict[str, float]:
    """One epoch, in steps of 16 rows: speed of this process's threads, fill, and memory above the start."""
    shards = Shards(str(folder), prefetch=prefetch)
    steps = shards.order(ROW_LENGTH, 0).rows // ROWS
    start = resident_mb()
    seen, quarters = 0, [0.0] * 4
    began, cpu = time.perf_counter(), time.process_time()
    stream = training_steps(
        shards, Collate(ROW_LENGTH), seed=0, start_row=0, rows_per_step=ROWS, micro_batch=4, rank=0, ranks=1
    )
    with closing(stream):
        for number in range(steps):
            seen += sum(int(batch.loss_mask.sum()) for batch in next(stream))
            quarter = number * 4 // steps
            quarters[quarter] = max(quarters[quarter], resident_mb() - start)
    return {
        "positions": seen,
        "positions_per_second": seen / (time.perf_counter() - began),
        "positions_per_cpu_second": seen / (time.process_time() - cpu),
        "fill": seen / (steps * ROWS * ROW_LENGTH),
        **{f"mb_above_start_in_quarter_{i + 1}": mb for i, mb in enumerate(quarters)},
    }


def main() -> None:
    shards, prefetch = (int(value) for value in [*sys.argv[1:3], *["100", "2"][len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder) / "cache", shards, 2, row_length=ROW_LENGTH)
        for name, value in read_epoch(cache, prefetch).items():
            print(f"{name:<32} {value:,.3f}")


if __name__ == "__main__":
    main()
