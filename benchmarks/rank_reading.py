"""How many blocks does a rank read over its share, how full are its rows, and how long does it take to resume?

Command:  OMP_NUM_THREADS=1 python -m benchmarks.rank_reading [--blocks 3072] [--resume-rows 10000000]

Reads are counted: the real order and the real reader of a rank decide which block is read when, over one epoch. Only
the decoding is left out. The factor is the blocks that a rank reads over the blocks of the cache divided by the ranks.
`Rows held` are the positions of decoded records that the rank keeps at most, in rows. Lengths are drawn: texts cut into
records of 512, conversations (log-normal, median 300, sigma 0.7) and documents (median 900, sigma 0.8), both cut at the
row length. Blocks hold up to 8,192 positions.

Resuming is timed from the lengths in memory to the first row of the rank, at a row in the middle of the second epoch.
"""

import argparse
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from data.cache.indexes.lengths import CacheLengths
from data.stream.mixing import MixedOrder
from data.stream.order import BlockRef, CacheOrder
from data.stream.readers import Readers
from data.stream.segments import Segments, count_side_by_side
from data.stream.source import RowOrder
from data.stream.stream import look_ahead, share_of_step

KINDS = {"texts of 512": (512, 0.0), "conversations": (300, 0.7), "documents": (900, 0.8)}
BLOCK_POSITIONS, STEP_ROWS, RANKS = 8192, 256, (1, 2, 8, 64, 256)


def drawn_lengths(kind: str, row_length: int, blocks: int, seed: int = 0) -> CacheLengths:
    """Lengths of a cache of so many blocks, 16 to a shard."""
    median, sigma = KINDS[kind]
    random = np.random.default_rng(seed)

    def pieces() -> Iterator[int]:
        while True:
            for document in random.lognormal(np.log(median), sigma, 10_000).round().astype(int).clip(2).tolist():
                yield from (min(row_length, document - start) for start in range(0, document, row_length))

    def block_lengths() -> Iterator[list[int]]:
        block, source = list[int](), pieces()
        for piece in source:
            if sum(block) + piece > BLOCK_POSITIONS:
                yield block
                block = []
            block.append(piece)

    drawn = list(islice(block_lengths(), blocks))
    return CacheLengths.from_shards(drawn[start : start + 16] for start in range(0, blocks, 16))


def counted_order(lengths: CacheLengths, row_length: int, seed: int = 0) -> CacheOrder:
    """The order of a cache whose rows are counted now."""
    segments = Segments.from_lengths(lengths, row_length)
    counts = np.concatenate(list(count_side_by_side(lengths, segments, row_length)))
    return CacheOrder(lengths, segments, counts, row_length, seed)


@dataclass
class Stand:
    """Stands for a record of so many positions."""

    positions: int

    def detached(self) -> "Stand":
        return self


class CountingReader:
    """Counts the blocks that are read. Their records have nothing but their lengths."""

    has_room = False

    def __init__(self, lengths: CacheLengths) -> None:
        self.lengths, self.reads = lengths, 0

    def block(self, ref: BlockRef) -> list[Stand]:
        self.reads += 1
        number = int(self.lengths.shard_starts[ref[0]]) + ref[1]
        return [Stand(n) for n in self.lengths.records[slice(*self.lengths.block_starts[number : number + 2])].tolist()]

    def keep_only(self, blocks: set[BlockRef]) -> None:
        pass

    def expect(self, blocks: Iterable[BlockRef]) -> None:
        pass


@dataclass
class Reading:
    """What a rank read: blocks, rows, their positions, and the most positions that were kept decoded."""

    blocks: int
    rows: int
    positions: int
    most_held: int


def read_as_rank(order: RowOrder, lengths: list[CacheLengths], rows: range, rank: int, ranks: int) -> Reading:
    """Reads the rows of one rank through its readers, looking ahead as training does."""
    counters = [CountingReader(each) for each in lengths]
    sources = [SimpleNamespace(reader=lambda each=each: each, on_damage="stop") for each in counters]
    readers = Readers(cast(Any, SimpleNamespace(parts=sources)), order)
    seen, held, parts = Reading(0, 0, 0, 0), 0, readers.parts
    steps = (share_of_step(order, rows[start : start + STEP_ROWS], rank, ranks)
             for start in range(0, len(rows), STEP_ROWS))  # fmt: skip
    ahead = look_ahead(steps, readers, order, STEP_ROWS)
    for row in (row for share, of_step in ahead if share.is_scored for row in of_step):
        part, before = row.place.part, counters[row.place.part].reads
        parts[part].expected.discard(row.place._replace(part=0))
        for ref in row.records:
            parts[part].take(ref, row.place)
        if counters[part].reads > before:
            held = sum(cast(Any, r).positions for each in parts for block in each.held.values()
                       for r in block.records.values())  # fmt: skip
        seen.rows, seen.positions = seen.rows + 1, seen.positions + row.positions
        seen.most_held = max(seen.most_held, held)
    seen.blocks = sum(counter.reads for counter in counters)
    return seen


def table(blocks: int, row_lengths: list[int]) -> str:
    """A line for each kind of lengths and row length."""
    lines = [
        "| lengths | row length | rows full | " + " | ".join(f"n = {n}" for n in RANKS) + " | rows held, n = 1 |",
        "|---|---|---|" + "---|" * (len(RANKS) + 1),
    ]
    for kind in KINDS:
        for row_length in row_lengths:
            lengths = drawn_lengths(kind, row_length, blocks)
            order = counted_order(lengths, row_length)
            fill = int(lengths.records.sum(dtype=np.int64)) / order.rows / row_length
            cells, most_held = list[str](), 0
            for n in RANKS:
                # A few ranks of many, spread over all of them.
                chosen = sorted({0, n // 3, n - 1})
                factors = list[float]()
                for rank in chosen:
                    seen = read_as_rank(order, [lengths], range(order.rows), rank, n)
                    factors.append(seen.blocks * n / blocks)
                    most_held = seen.most_held if n == 1 else most_held
                cells.append(f"{max(factors):.2f}")
            lines.append(f"| {kind} | {row_length} | {fill:.1%} | {' | '.join(cells)} | {most_held / row_length:.0f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def mixture_table(blocks: int, row_length: int) -> str:
    """Factors of a mixture 6 : 3 : 1 of the three kinds, over as many rows as an epoch of the first has shares."""
    lengths = [drawn_lengths(kind, row_length, blocks, seed) for seed, kind in enumerate(KINDS)]
    orders = [counted_order(each, row_length, 7) for each in lengths]
    mixed = MixedOrder(orders, [1 / 6, 1 / 3, 1])
    rows, cells = range(orders[0].rows), list[str]()
    for n in RANKS:
        seen = [read_as_rank(mixed, lengths, rows, rank, n) for rank in sorted({0, n // 3, n - 1})]
        share = sum(mixed.sequence.shares[i] * len(rows) / orders[i].rows * blocks for i in range(3)) / n
        cells.append(f"{max(each.blocks for each in seen) / share:.2f}")
    return f"| mixture 6 : 3 : 1 | {row_length} | | {' | '.join(cells)} | |"


def resume(rows: int, row_length: int = 512) -> str:
    """Seconds and memory from lengths and counts in memory to a rank's first 64 rows, of 64 lanes and of one."""
    block = BLOCK_POSITIONS // row_length
    blocks = rows // block
    records = np.full(rows, row_length, np.int32)
    lengths = CacheLengths(records, np.arange(blocks + 1) * block, np.append(np.arange(0, blocks, 64), blocks))
    started = time.perf_counter()
    segments = Segments.from_lengths(lengths, row_length)
    divided = time.perf_counter()
    counts = np.concatenate(list(count_side_by_side(lengths, segments, row_length)))
    counted = time.perf_counter()
    order = CacheOrder(lengths, segments, counts, row_length, 0)
    cursor = order.rows + order.rows // 2 + 12_345
    list(islice((order.row(order.place(i)) for i in count(cursor)), 64))
    done = time.perf_counter()
    return (
        f"{rows} rows: divided in {divided - started:.2f} s, counted in {counted - divided:.2f} s (kept in a file), "
        f"resumed in {done - counted:.3f} s; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3072)
    parser.add_argument("--row-lengths", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--resume-rows", type=int, default=10_000_000)
    args = parser.parse_args()
    if args.resume_rows:
        print(resume(args.resume_rows))
    print(table(args.blocks, args.row_lengths))
    print(mixture_table(args.blocks, args.row_lengths[0]))


if __name__ == "__main__":
    main()
