"""Interleaving of the rows of several caches in exact shares, as a pure function of their orders and weights.

    sequence of parts  g = a b a a b a a b a …      the next part is always the one furthest behind its share
    lane l of the run  takes g from place l on      so any 64 neighbouring rows have the shares, and so has any lane

Row i of the run is in lane i mod L of the run and takes the next row of that lane of its part. Rank r of n, where n
divides L, thus reads L / n lanes of each part. Any row is found by arithmetic, so a cursor is one number here too.

The lanes take each member of g one after another, once in every L rows. Members of a part with a share below 1 / L are
further apart than that, so its rows come in bursts of L.
"""

from collections.abc import Sequence
from functools import lru_cache

from data.stream.order import LANES, CacheOrder, Place, Row

MOST_AHEAD = 32_768  # rows to look ahead, whatever the smallest share is


class PartSequence:
    """The endless sequence of parts in which taken · cost stays as equal over the parts as whole rows allow.

    Args:
        costs: of one row of each part. With cost = (scored positions of a row) / weight, scored positions stand in the
            ratio of the weights.
    """

    def __init__(self, costs: Sequence[float]) -> None:
        self.costs = costs
        # The share of each part in the rows.
        total = sum(1 / cost for cost in costs)
        self.shares = [1 / cost / total for cost in costs]

    def part(self, taken: Sequence[int]) -> int:
        """Returns the next part, the one furthest behind. Of equal ones it is the first."""
        return min(range(len(taken)), key=lambda i: (taken[i] * self.costs[i], i))

    def taken(self, place: int) -> list[int]:
        """Returns how many of the first `place` members are of each part."""
        # Member j of a part stands at time j · cost. All that stand before a time are a beginning of the sequence.
        # Begin with a time at which there are fewer than `place`, and go on one by one from there.
        time = max(0.0, (place - 2 * len(self.costs)) / sum(1 / cost for cost in self.costs))
        taken = [int(time / cost) for cost in self.costs]
        for i, cost in enumerate(self.costs):
            while taken[i] > 0 and (taken[i] - 1) * cost >= time:
                taken[i] -= 1
            while taken[i] * cost < time:
                taken[i] += 1
        while sum(taken) < place:
            taken[self.part(taken)] += 1
        return taken


class MixedOrder:
    """The rows of several caches in the ratio of their shares, each found by its number."""

    def __init__(self, orders: Sequence[CacheOrder], costs: Sequence[float]) -> None:
        self.orders, self.sequence = orders, PartSequence(costs)
        self._taken = lru_cache(maxsize=4 * LANES)(self.sequence.taken)

    @property
    def shares(self) -> list[tuple[float, int]]:
        """Returns, for each cache, its share of the rows and the rows of its epoch."""
        return [(share, order.rows) for order, share in zip(self.orders, self.sequence.shares, strict=True)]

    @property
    def ahead(self) -> int:
        """Returns how many rows to look ahead. A part of a tiny share may read a block more than once."""
        parts = zip(self.orders, self.sequence.shares, strict=True)
        return min(max(int(order.ahead / share) + LANES for order, share in parts), MOST_AHEAD)

    def row(self, place: Place) -> Row:
        """Returns the records at a place."""
        return self.orders[place.part].row(place)

    def place(self, index: int) -> Place:
        """Returns the place of row `index` of the run."""
        turn, lane = divmod(index, LANES)
        taken = self._taken(lane + turn)
        part = self.sequence.part(taken)
        # The lane has taken so many rows of the part before.
        before = taken[part] - self._taken(lane)[part]
        return self.orders[part].place(before * LANES + lane)._replace(part=part)
