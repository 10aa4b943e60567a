"""Reading a cache from an S3 server of this machine with added latency, beside reading it from a folder.

    OMP_NUM_THREADS=1 python -m benchmarks.storage                       # 500,000 positions, 20 ms
    OMP_NUM_THREADS=1 python -m benchmarks.storage --latency-ms 100 --rounds 5

Rows are read as training reads them: `training_steps` with its thread, one rank, rows of 2,048 positions. Every round
reads two epochs of each, in turn, the first one of the bucket with an empty cache of blocks. The server (hadro) has no
core of its own. Whatever it computes slows the reader.

`--pace` lets the consumer take so many microseconds of sleep a position, as a step on a GPU would, so that only waiting
for data counts.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median

import pytest

from benchmarks.cached_records import made_up, write_cache
from data.cache.selection import Selection
from data.stream.collate import Collate
from data.stream.stream import Shards, training_steps
from tests.s3 import free_port, hadro, use_server

VOCAB, TOP_K, ROW_LENGTH, ROWS = 49_152, 64, 2048, 8
BARS = {"first epoch": 0.8, "second epoch": 0.95}


def epochs(shards: Shards, pace: float) -> Generator[float]:
    """Seconds of one epoch after the other."""
    rows = shards.order(ROW_LENGTH, 0).rows
    with closing(training_steps(shards, Collate(ROW_LENGTH), seed=0, rows_per_step=ROWS, micro_batch=ROWS)) as steps:
        while True:
            started = time.perf_counter()
            for batches in islice(steps, rows // ROWS):
                if pace:
                    time.sleep(pace * 1e-6 * batches[0].tokens.numel())
            yield time.perf_counter() - started


def two_epochs(shards: Shards, pace: float) -> list[float]:
    _ = shards.manifest
    with closing(epochs(shards, pace)) as taken:
        return list(islice(taken, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=500_000)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pace", type=float, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as environment:
        root, port, kept = Path(temporary), free_port(), Path(temporary, "blocks")
        use_server(environment, port)
        records = made_up(asked.positions, VOCAB, TOP_K)
        write_cache(root / "bucket" / "cache", records, VOCAB, Selection(top_k=TOP_K), "standard")
        positions = sum(record.positions for record in records)
        sides = {
            "folder": Shards(str(root / "bucket" / "cache")),
            "bucket": Shards("s3://bucket/cache", block_cache=str(kept)),
            "bucket, no cache of blocks": Shards("s3://bucket/cache", block_cache=None),
        }
        seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
        with hadro(root, port, "--latency-ms", str(asked.latency_ms)):
            for _ in range(asked.rounds):
                for name, shards in sides.items():
                    shutil.rmtree(kept, ignore_errors=True)
                    seconds[name].append(two_epochs(shards, asked.pace))
    speeds = {name: [positions / median(epoch) for epoch in zip(*runs, strict=True)] for name, runs in seconds.items()}
    pace = f", {asked.pace:g} µs a position for the consumer" if asked.pace else ""
    print(f"{positions} positions, K = {TOP_K}, rows of {ROW_LENGTH}, {asked.latency_ms:g} ms more a request{pace}")
    print(f"{platform.machine()}, load {os.getloadavg()[0]:.1f} of {os.cpu_count()}, medians of {asked.rounds}\n")
    print("| read from | first epoch, positions/s | / folder | second epoch, positions/s | / folder |")
    print("|---|---|---|---|---|")
    for name, (first, second) in speeds.items():
        ratios = [first / speeds["folder"][0], second / speeds["folder"][1]]
        print(f"| {name} | {first:,.0f} | {ratios[0]:.2f} | {second:,.0f} | {ratios[1]:.2f} |")
    print()
    for (epoch, bar), reached, folder in zip(BARS.items(), speeds["bucket"], speeds["folder"], strict=True):
        print(f"{epoch}: wanted {bar}, seen {reached / folder:.2f}: {'yes' if reached / folder >= bar else 'no'}")


if __name__ == "__main__":
    main()
