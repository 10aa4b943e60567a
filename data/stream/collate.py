"""Collation of packed rows of cache records into one `Batch`.

Padding is explicit. Positions and attention restart with each document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from data.cache.record import UNUSED, Array, Record
from kd_core.document_lengths import Documents
from kd_core.errors import UsageError
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, check_settings
from kd_core.types import Batch


@dataclass(frozen=True)
class Collate:
    """Collation of rows of at most `row_length` positions. The settings say what restarts at a document's end.

    A document ends where its record does. With `eod_id`, it also ends after each input token of that id. Set it for
    caches whose records hold several documents.

    Args:
        row_length: positions of a row, for packing.
        padding: `row_length`, or `longest` for the longest row of the batch.
        multiple: rows are padded further, to a multiple of this.
        reset_position_ids: positions count from 0 in each document. Otherwise they count from 0 in each row.
        reset_attention_mask: positions attend to their own document only. Otherwise they attend to all of the row
            before them.
        eod_mask_loss: no loss where the input is `eod_id`, because the label is the first token of another document.
        eod_id: the end-of-document token.
    """

    row_length: int = 512
    padding: Literal["row_length", "longest"] = "row_length"
    multiple: int = 1
    reset_position_ids: bool = True
    reset_attention_mask: bool = True
    eod_mask_loss: bool = False
    eod_id: int | None = None

    def __post_init__(self) -> None:
        check_settings(self, "collate.", row_length=AT_LEAST_1, multiple=AT_LEAST_1, eod_id=AT_LEAST_0)
        if self.eod_mask_loss and self.eod_id is None:
            raise UsageError("collate.eod_mask_loss: wanted collate.eod_id, the end-of-document token.")

    def __call__(self, rows: Sequence[Sequence[Record]]) -> Batch:
        """Returns the batch of the rows. Padding has `loss_mask` false, `document_ids` −1 and no teacher entry."""
        # Round the row length up to the multiple.
        row_sizes = [sum(record.positions for record in row) for row in rows]
        length = max(1, self.row_length if self.padding == "row_length" else max(row_sizes))
        T = -(-length // self.multiple) * self.multiple
        # Lay the records of each row end to end. Of a record's n + 1 ids, n are inputs and the last n labels.  [B, T]
        tokens, labels, starts, loss_mask = (
            np.zeros((len(rows), T), dtype) for dtype in (np.int64, np.int64, bool, bool)
        )
        label_log_probs = np.zeros((len(rows), T), np.float32)
        for b, row in enumerate(rows):
            start = 0
            for record in row:
                span = slice(start, start + record.positions)
                tokens[b, span], labels[b, span] = record.token_ids[:-1], record.token_ids[1:]
                loss_mask[b, span], label_log_probs[b, span] = record.loss_mask, record.label_log_prob
                starts[b, start] = True
                start = span.stop
        padding = np.arange(T) >= np.array(row_sizes)[:, None]
        ids, log_probs, tail = _entries(rows, T)
        # A document starts behind each end-of-document input, whose own label belongs to that next document.
        if self.eod_id is not None:
            ends = (tokens == self.eod_id) & ~padding
            starts[:, 1:] |= ends[:, :-1]
            loss_mask &= ~(ends & self.eod_mask_loss)
        document_ids = torch.from_numpy(_document_ids(starts & self.reset_attention_mask, padding))
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            loss_mask=torch.from_numpy(loss_mask),
            position_ids=torch.from_numpy(_position_ids(starts & self.reset_position_ids, padding)),
            document_ids=document_ids,
            topk_token_ids=torch.from_numpy(ids),
            topk_log_probs=torch.from_numpy(log_probs),
            tail_log_prob=torch.from_numpy(tail),
            label_log_prob=torch.from_numpy(label_log_probs),
            tempered_tails=_tempered_tails(rows, T),
            documents=Documents.from_ids(document_ids),
            record_names=tuple(record.name for row in rows for record in row),
        )


def _tempered_tails(rows: Sequence[Sequence[Record]], length: int) -> tuple[tuple[float, torch.Tensor], ...]:
    """Returns the tails [B, T] at each further temperature that every record has. They are 0 on padding."""
    # Keep only temperatures that all records captured: a tail cannot be computed from the entries afterwards.
    captured = [set(record.tempered_tails) for row in rows for record in row]
    tails: dict[float, Array] = {}
    for temperature in sorted(set[float]().union(*captured).intersection(*captured)):
        tails[temperature] = np.zeros((len(rows), length), np.float32)
        for b, row in enumerate(rows):
            start = 0
            for record in row:
                tails[temperature][b, start : (start := start + record.positions)] = record.tempered_tails[temperature]
    return tuple((temperature, torch.from_numpy(tail)) for temperature, tail in tails.items())


def _position_ids(starts: Array, padding: Array) -> Array:
    """Returns each position's distance from the latest start at or before it, and 0 on padding.  [B, T]"""
    index = np.arange(starts.shape[1])
    # The running maximum over the indices of starts is the index of the latest one.  [B, T]
    return np.where(padding, 0, index - np.maximum.accumulate(np.where(starts, index, 0), axis=1))


def _document_ids(starts: Array, padding: Array) -> Array:
    """Returns each position's document in its row, counted from 0, and −1 on padding.  [B, T]"""
    # The running count of starts, without the one at position 0, numbers the documents.  [B, T]
    later = starts.copy()
    later[:, 0] = False
    return np.where(padding, -1, np.cumsum(later, axis=1, dtype=np.int64))


def _entries(rows: Sequence[Sequence[Record]], length: int) -> tuple[Array, Array, Array]:
    """Returns ids [B, T, K], log-probabilities [B, T, K] and tail [B, T]. Samples are entries in place of the tail.

    Every element is written once: these arrays are most of a batch's bytes.
    """
    # K is the most entries and samples that any record has.
    samples_of = {id(record): record.samples() for row in rows for record in row}
    K = max((1, *(r.topk_token_ids.shape[1] + samples_of[id(r)][0].shape[1] for row in rows for r in row)))
    ids, log_probs = np.empty((len(rows), length, K), np.int32), np.empty((len(rows), length, K), np.float32)
    tail = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        start = 0
        for record in row:
            span, (samples, log_weights) = slice(start, start := start + record.positions), samples_of[id(record)]
            k = record.topk_token_ids.shape[1]
            end = k + samples.shape[1]
            # Columns 0 … k hold the entries, k … end the samples, and those behind are unused.  [T, K]
            ids[b, span, :k], log_probs[b, span, :k] = record.topk_token_ids, record.topk_log_probs
            if end > k:
                ids[b, span, k:end], log_probs[b, span, k:end] = samples, log_weights
            ids[b, span, end:], log_probs[b, span, end:] = 0, UNUSED
            # Samples estimate the whole mass outside the entries, so nothing is left for a tail.  [T]
            tail[b, span] = UNUSED if end > k else record.tail_log_prob
        # Padding has no entry.
        ids[b, start:], log_probs[b, start:] = 0, UNUSED
    return ids, log_probs, tail
