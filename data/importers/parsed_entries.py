"""Entries of other systems as records: checks of ids and numbers, the tail, and the label's log-probability.

The tail is the mass that the entries leave to 1. A label that is no entry, and whose log-probability is not stated, is
given the highest one that it can have: that of the least likely entry or of the whole tail, whichever is lower.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from data.cache.codec.header import check_size
from data.cache.record import UNUSED, Array, Record
from data.importers.settings import Values
from kd_core.json_fields import short_repr

LEAST_FLOAT = float(np.finfo(np.float32).min)
LOGITS_ADVICE = ". If the numbers are logits, say --values=logits"
MOST_MASS = 1.05  # of a position's entries, which exceed 1 by the writer's rounding and are scaled back to 1


class Line(NamedTuple):
    """A record, and the fields that its source did not state."""

    record: Record
    unknown: frozenset[str]


@dataclass(frozen=True)
class Entries:
    """Entries of T positions: ids [T, K], log-probabilities [T, K] with −inf for unused ones, and the tail [T].

    `is_tail_known` is False where the source does not show the mass outside the entries, which then sum to 1.
    """

    ids: Array
    logs: Array
    tail: Array
    is_tail_known: bool

    def at(self, positions: slice) -> "Entries":
        """Returns the entries of some positions."""
        return Entries(self.ids[positions], self.logs[positions], self.tail[positions], self.is_tail_known)


def parse_ids(value: Any, name: str, vocab_size: int) -> Array:
    """Returns token ids as int32 [n].

    Raises:
        ValueError: they are no ids of the vocabulary.
    """
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of several lengths
        ids = np.zeros((1, 1))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{name}: wanted a list of token ids")
    check_range(ids, name, vocab_size)
    return ids.astype(np.int32)


def check_range(ids: Array, name: str, vocab_size: int) -> None:
    """Raises ValueError for ids outside the vocabulary."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{name}: ids {ids.min()} to {ids.max()}; the vocabulary has {vocab_size}")


def parse_mask(value: Any, positions: int) -> Array:
    """Returns a loss mask as uint8 [T]."""
    mask = np.asarray(value, np.float64)
    if mask.shape != (positions,) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"loss_mask: wanted {positions} numbers, each 0 or 1")
    return mask.astype(np.uint8)


def _check_lists(rows: Any, name: str) -> None:
    """Raises for anything but a list of lists, such as a server's null for the first position."""
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        return
    if not isinstance(rows, list):
        raise ValueError(f"{name}: a {type(rows).__name__}; wanted a list of a list for each position")
    for i, row in enumerate(cast(list[Any], rows)):
        if not isinstance(row, list | np.ndarray):
            raise ValueError(
                f"position {i}: its {name} are {short_repr(row)}; wanted a list, empty for a position without"
            )


def check_entries(ids: Array, logs: Array, vocab_size: int) -> tuple[Array, Array]:
    """Returns ids [T, K] as int32 and numbers [T, K] as float64, with id 0 where a number is −inf and so not used.

    Raises:
        ValueError: an id is outside the vocabulary or stands twice at a position, or a number is not finite.
    """
    if np.isnan(logs).any() or (logs == np.inf).any():
        raise ValueError("an entry is not a finite number")
    used = logs > UNUSED
    ids = np.where(used, ids, 0)
    check_range(ids, "ids", vocab_size)
    # Sort each row. Unused entries become different ids below 0, so that only used ones can be equal.  [T, K]
    keys = np.sort(np.where(used, ids.astype(np.int64), -1 - np.arange(ids.shape[1])), axis=1)
    if (twice := (keys[:, 1:] == keys[:, :-1]).any(axis=1)).any():
        raise ValueError(f"position {int(twice.argmax())}: an id twice")
    return ids.astype(np.int32), logs.astype(np.float64)


def parse_entries(ids: Any, logs: Any, positions: int, vocab_size: int) -> tuple[Array, Array]:
    """Returns ids and numbers as arrays [T, K]. Shorter rows are padded with unused entries.

    Raises:
        ValueError: they are not a row of ids and a row of as many numbers for each position.
    """
    _check_lists(ids, "ids")
    _check_lists(logs, "numbers")
    if len(ids) != positions or len(logs) != positions:
        raise ValueError(f"has {len(ids)} rows of ids and {len(logs)} of numbers for {positions} positions")
    widest = max(map(len, ids), default=0)
    if not widest:
        raise ValueError("has no entry at any position")
    check_size(positions, widest)
    if isinstance(ids, np.ndarray) and isinstance(logs, np.ndarray) and ids.shape == logs.shape == (positions, widest):
        if ids.dtype.kind not in "iu" or logs.dtype.kind != "f":
            raise ValueError(f"ids and numbers are {ids.dtype} and {logs.dtype}; wanted integers and floats")
        return check_entries(ids, logs, vocab_size)
    return check_entries(*_pad_rows(ids, logs, (positions, widest), vocab_size), vocab_size)


def _pad_rows(ids: Any, logs: Any, shape: tuple[int, int], vocab_size: int) -> tuple[Array, Array]:
    """Returns rows of ids and of numbers as arrays [T, K], padded with unused entries."""
    all_ids, all_logs = np.zeros(shape, np.int32), np.full(shape, UNUSED)
    for row, (row_ids, values) in enumerate(zip(ids, logs, strict=True)):
        if len(row_ids) != len(values):
            raise ValueError(f"position {row}: {len(row_ids)} ids for {len(values)} numbers")
        if len(row_ids):
            all_ids[row, : len(row_ids)] = parse_ids(row_ids, f"ids of position {row}", vocab_size)
            all_logs[row, : len(row_ids)] = values
    return all_ids, all_logs


def from_log_probs(ids: Array, logs: Array, most_mass: float = MOST_MASS, advice: str = "") -> Entries:
    """Returns entries of true log-probabilities [T, K], scaled to a mass of at most 1, and the tail that is missing.

    Raises:
        ValueError: the entries of a position sum to more than `most_mass`, or to no number. `advice` ends the message.
    """
    with np.errstate(over="ignore"):
        mass = np.exp(logs).sum(axis=1)
    if not (mass <= most_mass).all():
        position = int(mass.argmax())  # of the first NaN, or of the highest
        raise ValueError(f"position {position}: entries sum to {mass[position]:.5g}; wanted probabilities{advice}")
    logs = logs - np.log(np.maximum(mass, 1))[:, None]
    with np.errstate(divide="ignore"):
        tail = np.log1p(-np.minimum(np.exp(logs).sum(axis=1), 1))
    return Entries(ids, logs, tail, is_tail_known=True)


def from_logits(ids: Array, logits: Array) -> Entries:
    """Returns entries renormalised over themselves: the log softmax of logits [T, K], with an unknown tail."""
    highest = logits.max(axis=1, keepdims=True)
    # A position without entries keeps its mass in the tail, which is all that is known there.
    has_entries = highest[:, 0] > UNUSED
    shifted = logits - np.where(highest > UNUSED, highest, 0.0)
    with np.errstate(divide="ignore"):
        logs = shifted - np.where(has_entries, np.log(np.exp(shifted).sum(axis=1)), 0.0)[:, None]
    return Entries(ids, logs, np.where(has_entries, UNUSED, 0.0), is_tail_known=False)


def normalise(
    ids: Array, numbers: Array, values: Values, auto: Values = "log_probs", most_mass: float = MOST_MASS
) -> Entries:
    """Returns entries of log-probabilities or logits, as `values` says the numbers are, or `auto` where it does not."""
    if (auto if values == "auto" else values) == "logits":
        return from_logits(ids, numbers)
    return from_log_probs(ids, numbers, most_mass, LOGITS_ADVICE)


def _parse_label_logs(value: Any, positions: int) -> Array:
    """Returns stated log-probabilities of labels, as float64 [T]."""
    try:
        label_logs = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        label_logs = np.zeros(0)
    if label_logs.shape != (positions,) or not ((label_logs >= LEAST_FLOAT) & (label_logs <= 0)).all():
        raise ValueError(f"log-probabilities of the labels: wanted {positions} finite numbers, none above 0")
    return label_logs


def make_line(
    document: str, token_ids: Array, mask: Array, entries: Entries, label_logs: Any = None, start: int = 0
) -> Line:
    """Returns the record of a window, with the fields that are not known.

    `label_logs` [T] are stated log-probabilities of the labels. Those of labels that are entries are not used.
    """
    # An entry below the least float32 has no probability, and is not used.
    with np.errstate(over="ignore"):
        ids, logs, tail = entries.ids, entries.logs.astype(np.float32), entries.tail.astype(np.float32)
    # The label's log-probability is that of its entry, if it has one.  [T]
    labels = token_ids[1:]
    entry_log_prob = np.where(ids == labels[:, None], logs, UNUSED).max(axis=1, initial=UNUSED)
    is_entry = entry_log_prob > UNUSED
    if label_logs is None:
        # Otherwise it is bounded by the least likely entry, and by the tail where there is one.  [T]
        lowest = np.where(logs > UNUSED, logs, 0.0).min(axis=1, initial=0.0)
        other = np.where(tail > UNUSED, np.minimum(tail, lowest), lowest)
    else:
        other = _parse_label_logs(label_logs, len(labels))
    record = Record(
        name="", document=document, start=start, token_ids=token_ids, loss_mask=mask, topk_token_ids=ids,
        topk_log_probs=logs, tail_log_prob=tail,
        label_log_prob=np.where(is_entry, entry_log_prob, other).astype(np.float32),
    )  # fmt: skip
    unknown = set[str]() if entries.is_tail_known else {"tail"}
    if label_logs is None and (~is_entry & (mask > 0)).any():
        unknown.add("label_log_prob")
    return Line(record, frozenset(unknown))
