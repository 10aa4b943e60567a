"""How likely: levels of the head's entries, the tail, and the label's own log-probability where it is no entry."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.cache.codec.coding import Coding
from data.cache.codec.entries import Entries
from data.cache.codec.fixed import fixed_planes, float_planes, from_fixed, from_floats
from data.cache.codec.levels import Levels
from data.cache.codec.ranks import Ragged
from data.cache.columns import Columns
from data.cache.record import UNUSED

Array = np.ndarray[Any, np.dtype[Any]]
Planes = list[Array]
LEVEL_ERROR = 0.1  # of the sum of levels and tail against 1, at most: more means that they do not belong together


def _row_order(classes: Array, rows: Ragged) -> Array:
    """The rows of the levels: flat distributions apart from peaked ones, by lowest level or number of entries."""
    return np.argsort(classes if rows.used is None else rows.counts.astype(np.uint16), kind="stable")


def log_prob_planes(columns: Columns, head: Entries, levels: Levels | None) -> Planes:
    """Entries, tail, labels, further tails: by levels and fixed point, or as float32 where `levels` is None."""
    if levels is None:
        planes = float_planes(head.rows.flat(head.logs)) + float_planes(columns.tail) + float_planes(columns.label_logs)
        return [*planes, *(plane for tail in columns.tempered for plane in float_planes(tail))]
    codes = _top_one_kept(levels.to_levels(head.logs), head.logs, len(levels.log_probs) - 1)
    classes = codes.min(axis=1) if head.rows.K and head.rows.used is None else np.zeros(len(codes), np.uint8)
    order = _row_order(classes, head.rows)
    outside = columns.label_entries() == UNUSED
    planes = [classes, head.rows.rows(order).flat(codes[order]), *fixed_planes(columns.tail)]
    planes += fixed_planes(columns.label_logs[outside])
    return [*planes, *(plane for tail in columns.tempered for plane in fixed_planes(tail))]


def _top_one_kept(codes: Array, logs: Array, highest: int) -> Array:
    """The likeliest entry of each row a level above the others, so that rounding makes no tie of it."""
    if codes.shape[1] > 1:
        rows, best = np.arange(len(codes)), logs.argmax(axis=1)
        others = codes.copy()
        others[rows, best] = 0
        codes[rows, best] = np.minimum(np.maximum(codes[rows, best], others.max(axis=1).astype(np.int32) + 1), highest)
    return codes


@dataclass(frozen=True)
class LogProbs:
    """`head` [T, K], the others [T]."""

    head: Array
    tail: Array
    labels: Array
    tempered: list[Array]


def _decode_floats(planes: Planes, rows: Ragged) -> LogProbs:
    flat, tail, labels, *tempered = (from_floats(planes[i : i + 4]) for i in range(0, len(planes), 4))
    head = rows.padded(flat)
    if rows.used is not None:
        head[~rows.used] = UNUSED
    _check_mass(np.exp(head).sum(axis=1) + np.exp(tail))
    return LogProbs(head, tail, labels, list(tempered))


def _check_mass(total: Array) -> None:
    if not (apart := np.abs(total - 1) <= LEVEL_ERROR).all():  # so asked, NaN does not pass
        raise ValueError(f"entries and tail sum to {total[apart.argmin()]:.3f}, wanted 1")


def _decode_levels(planes: Planes, ids: Array, labels: Array, rows: Ragged, levels: Levels) -> LogProbs:
    classes, flat, *fixed = planes
    if len(classes) != len(ids):
        raise ValueError(f"has row classes of {len(classes)} positions, wanted {len(ids)}")
    order = _row_order(classes, rows)
    codes = np.empty(ids.shape, np.uint8)
    codes[order] = rows.rows(order).padded(flat)
    if int(codes.max(initial=0)) >= len(levels.log_probs):
        raise ValueError(f"holds level {codes.max()}; there are {len(levels.log_probs)}")
    tail, outside, *tempered = (from_fixed(fixed[i : i + 2]) for i in range(0, len(fixed), 2))
    at = codes.astype(np.intp)  # what taking wants; else each would make its own
    head, probs = levels.log_probs.take(at, mode="wrap"), levels.probs.take(at, mode="wrap")
    if rows.used is not None:
        head[~rows.used], probs[~rows.used] = UNUSED, 0.0
    total = probs.sum(axis=1) + np.exp(tail)
    _check_mass(total)
    shift = np.log(total)
    head -= shift[:, None]
    label_logs = np.full(len(labels), np.nan, np.float32)
    if rows.K:
        own = ids == labels.astype(ids.dtype)[:, None]  # of one type: else all ids are converted first
        own = own if rows.used is None else own & rows.used
        entry = np.flatnonzero(own)
        label_logs[entry // rows.K] = head.ravel()[entry]
    missing = np.isnan(label_logs)
    if int(missing.sum()) != len(outside):
        raise ValueError(f"has {len(outside)} labels of their own; {missing.sum()} are no entry")
    label_logs[missing] = outside
    return LogProbs(head, tail - shift, label_logs, list(tempered))


def decode_log_probs(planes: Planes, ids: Array, labels: Array, rows: Ragged, coding: Coding) -> LogProbs:
    """What `log_prob_planes` wrote; entries and tail sum to 1.

    Raises:
        ValueError: the planes do not belong together.
    """
    levels, further = coding.levels, len(coding.selection.tail_temperatures)
    wanted = 12 + 4 * further if levels is None else 6 + 2 * further
    if len(planes) != wanted:
        raise ValueError(f"has {len(planes)} planes, wanted {wanted}")
    found = _decode_floats(planes, rows) if levels is None else _decode_levels(planes, ids, labels, rows, levels)
    if {len(each) for each in (found.tail, found.labels, *found.tempered)} != {len(labels)}:
        raise ValueError(f"holds tails or labels of another number of positions than {len(labels)}")
    return found
