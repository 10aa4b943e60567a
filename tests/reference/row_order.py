"""The order of rows by plain lists, slowly, as `data/stream/order.py` and `data/stream/segments.py` describe it.

It shares no code with them but numpy's generator, whose draws the order is made of.
"""

import numpy as np

Blocks = list[list[int]]  # positions by block and record
Record = tuple[int, int]  # block, record of it


def cut(sizes: list[int], least: int) -> list[list[int]]:
    """Runs of neighbours. One that begins in the k-th stretch of `least` positions belongs to run k, the last takes the
    rest."""
    most = max(sum(sizes) // least - 1, 0)
    runs: dict[int, list[int]] = {}
    before = 0
    for number, size in enumerate(sizes):
        runs.setdefault(min(before // least, most), []).append(number)
        before += size
    return [runs[key] for key in sorted(runs)]


def pack(lengths: list[int], row_length: int) -> list[list[int]]:
    """Best fit, the longest first: rows of indices in the order in which they are opened."""
    rows: list[list[int]] = []
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for index in longest_first:
        free = [row_length - sum(lengths[i] for i in row) for row in rows]
        fitting = [number for number in range(len(rows)) if free[number] >= lengths[index]]
        if fitting:
            rows[min(fitting, key=lambda number: (free[number], number))].append(index)
        else:
            rows.append([index])
    return rows


def segment_rows(blocks: Blocks, segment: list[int], row_length: int, seed: int | None, epoch: int, number: int):
    """The rows of one segment, in their order."""
    random = None if seed is None else np.random.default_rng([seed, epoch, number])
    made: list[list[Record]] = []
    carried: list[Record] = []
    windows = [[segment[i] for i in run] for run in cut([sum(blocks[b]) for b in segment], row_length)]
    for window in windows:
        records = carried + [(block, i) for block in window for i in range(len(blocks[block]))]
        records = sorted(records) if random is None else [records[i] for i in random.permutation(len(records))]
        rows = [sorted(row) for row in pack([blocks[b][i] for b, i in records], row_length)]
        free = [row_length - sum(blocks[records[i][0]][records[i][1]] for i in row) for row in rows]
        most_carried = min(8, max(4, 8192 // row_length)) if window is not windows[-1] else 0
        emptiest = sorted((-free[i], i) for i in range(len(rows)) if free[i] > row_length // 50)[:most_carried]
        carried = [records[i] for _, row in emptiest for i in rows[row]]
        left = [[records[i] for i in row] for n, row in enumerate(rows) if n not in [row for _, row in emptiest]]
        made += sorted(left) if random is None else [left[i] for i in random.permutation(len(left))]
    return made


def epoch_rows(blocks: Blocks, row_length: int, seed: int | None, epoch: int) -> list[list[Record]]:
    """All rows of an epoch."""
    segments = cut([sum(block) for block in blocks], 256 * row_length)
    random = None if seed is None else np.random.default_rng([seed, epoch])
    order = list(range(len(segments))) if random is None else random.permutation(len(segments)).tolist()
    line = [row for number in order for row in segment_rows(blocks, segments[number], row_length, seed, epoch, number)]
    if random is None:
        return line
    # Lanes are pieces of the line. Those that are dealt first are one longer where the division leaves a rest.
    count = min(64, len(line))
    dealt = random.permutation(count).tolist()
    sizes = {lane: len(line) // count + (turn < len(line) % count) for turn, lane in enumerate(dealt)}
    lanes, start = {}, 0
    for lane in range(count):
        lanes[lane] = line[start : start + sizes[lane]]
        start += sizes[lane]
    rounds = max(sizes.values(), default=0)
    return [lanes[lane][turn] for turn in range(rounds) for lane in dealt if turn < len(lanes[lane])]
