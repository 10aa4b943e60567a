"""Rows of records into one `Batch`: packed, padded explicitly, positions restarted with each document."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.cache.record import UNUSED, Array, Record
from kd_core.errors import UsageError
from kd_core.types import Batch

PADDINGS = ("row_length", "longest")


@dataclass(frozen=True)
class Collate:
    """Rows of `row_length` positions, padded to it or to the longest row of the batch."""

    row_length: int = 512
    padding: str = "row_length"

    def __post_init__(self) -> None:
        if self.row_length < 1:
            raise UsageError(f"collate.row_length: got {self.row_length}; wanted at least 1.")
        if self.padding not in PADDINGS:
            raise UsageError(f"collate.padding: got {self.padding!r}; wanted one of {', '.join(PADDINGS)}.")

    def __call__(self, rows: Sequence[Sequence[Record]]) -> Batch:
        """A batch of the rows. Padding has `loss_mask` false, `document_ids` −1 and no teacher entry."""
        longest = max(1, *(sum(record.positions for record in row) for row in rows))
        T = self.row_length if self.padding == "row_length" else longest
        entries = [[_entries(record) for record in row] for row in rows]
        B, K = len(rows), max((1, *(ids.shape[1] for row in entries for ids, _, _ in row)))
        flat = {name: np.zeros((B, T), np.int64) for name in ("tokens", "labels", "position_ids", "loss_mask")}
        documents = np.full((B, T), -1, np.int64)
        ids, log_probs = np.zeros((B, T, K), np.int32), np.full((B, T, K), -np.inf, np.float32)
        tail, label = np.zeros((B, T), np.float32), np.zeros((B, T), np.float32)
        for b, row in enumerate(rows):
            start = 0
            for document, record in enumerate(row):
                at = slice(start, start := start + record.positions)
                own_ids, own_logs, tail[b, at] = entries[b][document]
                k = own_ids.shape[1]
                flat["tokens"][b, at] = record.token_ids[:-1]
                flat["labels"][b, at] = record.token_ids[1:]
                flat["position_ids"][b, at] = np.arange(record.positions)
                flat["loss_mask"][b, at] = record.loss_mask
                documents[b, at] = document
                ids[b, at, :k], log_probs[b, at, :k] = own_ids, own_logs
                label[b, at] = record.label_log_prob
        return Batch(
            tokens=torch.from_numpy(flat["tokens"]),
            labels=torch.from_numpy(flat["labels"]),
            loss_mask=torch.from_numpy(flat["loss_mask"]).bool(),
            position_ids=torch.from_numpy(flat["position_ids"]),
            document_ids=torch.from_numpy(documents),
            topk_token_ids=torch.from_numpy(ids),
            topk_log_probs=torch.from_numpy(log_probs),
            tail_log_prob=torch.from_numpy(tail),
            label_log_prob=torch.from_numpy(label),
            record_names=tuple(record.name for row in rows for record in row),
        )


def _entries(record: Record) -> tuple[Array, Array, Array]:
    """Ids, log-probabilities and tail; samples, where there are any, are entries in the place of the tail."""
    samples, weights = record.samples()
    if not samples.shape[1]:
        return record.topk_token_ids, record.topk_log_probs, record.tail_log_prob
    ids = np.concatenate([record.topk_token_ids, samples], axis=1)
    logs = np.concatenate([record.topk_log_probs, weights], axis=1)
    return ids, logs, np.full(record.positions, UNUSED, np.float32)
