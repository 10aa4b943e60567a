"""Log-probabilities of a block as planes: the top-K entries, the tails and the labels.

`standard` and `compact` store entries as levels (one byte), and tails as fixed point (two bytes). Labels that are no
entry are stored as fixed point too, and all others take the log-probability of their entry. `lossless` stores entries,
tails and all labels as float32 (four bytes).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.cache.codec.coding import Coding
from data.cache.codec.entries import RankedEntries
from data.cache.codec.fixed import decode_fixed, decode_floats, encode_fixed, encode_floats
from data.cache.codec.levels import Levels
from data.cache.codec.ranks import Ragged
from data.cache.columns import Columns
from data.cache.record import UNUSED

Array = np.ndarray[Any, np.dtype[Any]]
Planes = list[Array]
LEVEL_ERROR = 0.1  # largest deviation from 1 of entries + tail; more means that the planes do not belong together


def _row_order(classes: Array, rows: Ragged) -> Array:
    """Returns the order of positions in the plane of levels, as indices [N].

    It separates flat distributions from peaked ones, so that neighbours have similar levels and compress together.
    """
    # Sort stably by the lowest level of a position, or by its number of entries where positions differ in that.  [N]
    return np.argsort(classes if rows.used is None else rows.counts.astype(np.uint16), kind="stable")


def encode_log_probs(columns: Columns, entries: RankedEntries, levels: Levels | None) -> Planes:
    """Returns the planes of entries, tail, labels and further tails, as float32 where `levels` is None."""
    # Lossless: four planes each of entries [Σ counts], tail [N], labels [N] and each further tail [N].
    if levels is None:
        planes = (
            encode_floats(entries.rows.flat(entries.logs))
            + encode_floats(columns.tail)
            + encode_floats(columns.label_logs)
        )
        return [*planes, *(plane for tail in columns.tempered for plane in encode_floats(tail))]
    # Quantise every entry.  [N, K] of uint8
    codes = _keep_top_one(levels.to_levels(entries.logs), entries.logs, len(levels.log_probs) - 1)
    # The class of a position is its lowest level: the reader needs it to restore the order.  [N]
    classes = codes.min(axis=1) if entries.rows.K and entries.rows.used is None else np.zeros(len(codes), np.uint8)
    order = _row_order(classes, entries.rows)
    # Store a label's log-probability only where the label is not an entry.  [N] of bool
    outside = columns.label_entries() == UNUSED
    planes = [classes, entries.rows.rows(order).flat(codes[order]), *encode_fixed(columns.tail)]
    planes += encode_fixed(columns.label_logs[outside])
    return [*planes, *(plane for tail in columns.tempered for plane in encode_fixed(tail))]


def _keep_top_one(codes: Array, logs: Array, highest: int) -> Array:
    """Raises the likeliest entry of each row above all others by a level, so that rounding makes no tie."""
    if codes.shape[1] > 1:
        rows, best = np.arange(len(codes)), logs.argmax(axis=1)
        # Levels of all entries but the likeliest.  [N, K]
        rest = codes.copy()
        rest[rows, best] = 0
        # code_best = min(max(code_best, max(rest) + 1), highest), in int32 so that 255 + 1 does not wrap.  [N]
        codes[rows, best] = np.minimum(np.maximum(codes[rows, best], rest.max(axis=1).astype(np.int32) + 1), highest)
    return codes


@dataclass(frozen=True)
class LogProbs:
    """Decoded log-probabilities of a block: `entries` [N, K], `tail`, `labels`, `tempered` [N]."""

    entries: Array
    tail: Array
    labels: Array
    tempered: list[Array]


def _decode_floats(planes: Planes, rows: Ragged) -> LogProbs:
    # Four planes a number: entries [Σ counts], tail [N], labels [N], further tails [N].
    flat, tail, labels, *tempered = (decode_floats(planes[i : i + 4]) for i in range(0, len(planes), 4))
    # Spread the entries over their rows again.  [Σ counts] → [N, K]
    entries = rows.padded(flat)
    if rows.used is not None:
        entries[~rows.used] = UNUSED
    _check_mass(np.exp(entries).sum(axis=1) + np.exp(tail))
    return LogProbs(entries, tail, labels, list(tempered))


def _check_mass(total: Array) -> None:
    if not (is_close := np.abs(total - 1) <= LEVEL_ERROR).all():  # a comparison with NaN is False, so NaN fails here
        raise ValueError(f"entries and tail sum to {total[is_close.argmin()]:.3f}, wanted 1")


def _decode_levels(planes: Planes, ids: Array, labels: Array, rows: Ragged, levels: Levels) -> LogProbs:
    # Planes: classes [N], levels [Σ counts], then fixed point: tail [N], labels outside the entries, further tails [N].
    classes, flat, *fixed = planes
    if len(classes) != len(ids):
        raise ValueError(f"has row classes of {len(classes)} positions, wanted {len(ids)}")
    # Undo the order of the levels, and spread them over their rows.  [Σ counts] → [N, K]
    order = _row_order(classes, rows)
    codes = np.empty(ids.shape, np.uint8)
    codes[order] = rows.rows(order).padded(flat)
    if int(codes.max(initial=0)) >= len(levels.log_probs):
        raise ValueError(f"holds level {codes.max()}; there are {len(levels.log_probs)}")
    tail, outside, *tempered = (decode_fixed(fixed[i : i + 2]) for i in range(0, len(fixed), 2))
    # Look up log p and p of each level. `take` indexes with intp: convert once for both.  [N, K]
    indices = codes.astype(np.intp)
    entries, probs = levels.log_probs.take(indices, mode="wrap"), levels.probs.take(indices, mode="wrap")
    if rows.used is not None:
        entries[~rows.used], probs[~rows.used] = UNUSED, 0.0
    # Normalise: log p − log Σ p over entries and tail, so that they sum to 1 in spite of rounding.  [N]
    total = probs.sum(axis=1) + np.exp(tail)
    _check_mass(total)
    shift = np.log(total)
    entries -= shift[:, None]
    # Give labels the log-probability of their entry, where there is one.  [N]
    label_logs = np.full(len(labels), np.nan, np.float32)
    if rows.K:
        is_label = ids == labels.astype(ids.dtype)[:, None]  # [N, K]; in one dtype, so that no ids are converted
        is_label = is_label if rows.used is None else is_label & rows.used
        flat_index = np.flatnonzero(is_label)
        label_logs[flat_index // rows.K] = entries.ravel()[flat_index]
    # All others were stored, in the order of positions.
    missing = np.isnan(label_logs)
    if int(missing.sum()) != len(outside):
        raise ValueError(f"has {len(outside)} labels of their own; {missing.sum()} are no entry")
    label_logs[missing] = outside
    return LogProbs(entries, tail - shift, label_logs, list(tempered))


def decode_log_probs(planes: Planes, ids: Array, labels: Array, rows: Ragged, coding: Coding) -> LogProbs:
    """Decodes the planes of `encode_log_probs`.

    Entries and tail of a position sum to 1. They are normalised where levels rounded them.

    Raises:
        ValueError: the planes do not belong together.
    """
    levels, further = coding.levels, len(coding.selection.tail_temperatures)
    # float32: 4 planes × (entries, tail, labels). Levels: classes, levels, and 2 planes × (tail, labels).
    expected = 12 + 4 * further if levels is None else 6 + 2 * further
    if len(planes) != expected:
        raise ValueError(f"has {len(planes)} planes, wanted {expected}")
    decoded = _decode_floats(planes, rows) if levels is None else _decode_levels(planes, ids, labels, rows, levels)
    if {len(values) for values in (decoded.tail, decoded.labels, *decoded.tempered)} != {len(labels)}:
        raise ValueError(f"holds tails or labels of another number of positions than {len(labels)}")
    return decoded
