"""Interleaving of the rows of several caches in exact shares, as a pure function of their orders and weights.

The next row always comes from the cache that is furthest behind its share. At no time is a cache ahead or behind by
more than about a row. A cursor is one number here too: a run that begins in the middle counts from the start.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from data.stream.order import Row


def interleave(orders: Sequence[Iterator[Row]], costs: Sequence[float]) -> Iterator[Row]:
    """Yields rows of endless orders so that positions · cost stay as equal over the orders as rows allow.

    With cost = (scored share of a cache's positions) / weight, scored positions stand in the ratio of the weights.
    """
    taken = [0] * len(orders)
    while True:
        part = min(range(len(orders)), key=lambda i: taken[i] * costs[i])
        row = next(orders[part])
        taken[part] += row.positions
        yield replace(row, part=part)
