"""Rows of records into one `Batch`: packed, padded explicitly, positions and attention restarted with each document."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.cache.record import UNUSED, Array, Record
from kd_core.errors import UsageError
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, check_ranges
from kd_core.types import Batch

PADDINGS = ("row_length", "longest")


@dataclass(frozen=True)
class Collate:
    """Rows of at most `row_length` positions as a batch; what ends with a document, each on its own.

    A document ends where its record does. With `eod_id`, it also ends after each input token of that id, as in caches
    whose records hold several documents.

    Args:
        row_length: positions of a row, for packing.
        padding: row_length, or longest: the longest row of the batch.
        multiple: rows are padded on to a multiple of this.
        reset_position_ids: each document's positions count from 0; else a row's.
        reset_attention_mask: a document's positions see no other document; else they see all of the row before them.
        eod_mask_loss: no loss where the input is `eod_id`: there the label is the first token of another document.
        eod_id: the end-of-document token.
    """

    row_length: int = 512
    padding: str = "row_length"
    multiple: int = 1
    reset_position_ids: bool = True
    reset_attention_mask: bool = True
    eod_mask_loss: bool = False
    eod_id: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "collate.", row_length=AT_LEAST_1, multiple=AT_LEAST_1, eod_id=AT_LEAST_0)
        if self.padding not in PADDINGS:
            raise UsageError(f"collate.padding: got {self.padding!r}; wanted one of {', '.join(PADDINGS)}.")
        if self.eod_mask_loss and self.eod_id is None:
            raise UsageError("collate.eod_mask_loss: wanted collate.eod_id, the end-of-document token.")

    def __call__(self, rows: Sequence[Sequence[Record]]) -> Batch:
        """A batch of the rows. Padding has `loss_mask` false, `document_ids` −1 and no teacher entry."""
        filled = [sum(record.positions for record in row) for row in rows]
        least = max(1, self.row_length if self.padding == "row_length" else max(filled))
        T = -(-least // self.multiple) * self.multiple
        tokens, labels, starts, loss_mask = (np.zeros((len(rows), T), t) for t in (np.int64, np.int64, bool, bool))
        label_logs = np.zeros((len(rows), T), np.float32)
        for b, row in enumerate(rows):
            start = 0
            for record in row:
                at = slice(start, start + record.positions)
                tokens[b, at], labels[b, at] = record.token_ids[:-1], record.token_ids[1:]
                loss_mask[b, at], label_logs[b, at] = record.loss_mask, record.label_log_prob
                starts[b, start] = True
                start = at.stop
        padding = np.arange(T) >= np.array(filled)[:, None]
        ids, log_probs, tail = _entries(rows, T)
        if self.eod_id is not None:
            ends = (tokens == self.eod_id) & ~padding
            starts[:, 1:] |= ends[:, :-1]
            loss_mask &= ~(ends & self.eod_mask_loss)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            loss_mask=torch.from_numpy(loss_mask),
            position_ids=torch.from_numpy(_positions(starts & self.reset_position_ids, padding)),
            document_ids=torch.from_numpy(_documents(starts & self.reset_attention_mask, padding)),
            topk_token_ids=torch.from_numpy(ids),
            topk_log_probs=torch.from_numpy(log_probs),
            tail_log_prob=torch.from_numpy(tail),
            label_log_prob=torch.from_numpy(label_logs),
            tempered_tails=_tempered(rows, T),
            record_names=tuple(record.name for row in rows for record in row),
        )


def _tempered(rows: Sequence[Sequence[Record]], length: int) -> tuple[tuple[float, torch.Tensor], ...]:
    """Tails at the further temperatures that every record has; 0 on padding."""
    captured = [set(record.tempered_tails) for row in rows for record in row]
    tails: dict[float, Array] = {}
    for temperature in sorted(set[float]().union(*captured).intersection(*captured)):
        tails[temperature] = np.zeros((len(rows), length), np.float32)
        for b, row in enumerate(rows):
            end = 0
            for record in row:
                tails[temperature][b, end : (end := end + record.positions)] = record.tempered_tails[temperature]
    return tuple((temperature, torch.from_numpy(tail)) for temperature, tail in tails.items())


def _positions(starts: Array, padding: Array) -> Array:
    """How far each position is from the latest start before it; 0 on padding."""
    at = np.arange(starts.shape[1])
    return np.where(padding, 0, at - np.maximum.accumulate(np.where(starts, at, 0), axis=1))


def _documents(starts: Array, padding: Array) -> Array:
    """How many starts there are up to each position after the first; −1 on padding."""
    later = starts.copy()
    later[:, 0] = False
    return np.where(padding, -1, np.cumsum(later, axis=1, dtype=np.int64))


def _entries(rows: Sequence[Sequence[Record]], length: int) -> tuple[Array, Array, Array]:
    """Ids, log-probabilities and tail; samples, where there are any, are entries in the place of the tail.

    Nothing is written twice: this is most of a batch's bytes.
    """
    drawn = {id(record): record.samples() for row in rows for record in row}
    K = max((1, *(r.topk_token_ids.shape[1] + drawn[id(r)][0].shape[1] for row in rows for r in row)))
    ids, logs = np.empty((len(rows), length, K), np.int32), np.empty((len(rows), length, K), np.float32)
    tail = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        start = 0
        for record in row:
            at, (samples, weights) = slice(start, start := start + record.positions), drawn[id(record)]
            k = record.topk_token_ids.shape[1]
            end = k + samples.shape[1]
            ids[b, at, :k], logs[b, at, :k] = record.topk_token_ids, record.topk_log_probs
            if end > k:
                ids[b, at, k:end], logs[b, at, k:end] = samples, weights
            ids[b, at, end:], logs[b, at, end:] = 0, UNUSED
            tail[b, at] = UNUSED if end > k else record.tail_log_prob
        ids[b, start:], logs[b, start:] = 0, UNUSED
    return ids, logs, tail
