"""The positions of several records end to end, as the codec works on them, with their checks and the codec's audit.

    records → Columns.from_records → check: ids, NaN, mass, labels
                         → encode, decode → audit: KL(original‖decoded)

`Columns` holds arrays over N positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.cache.record import UNUSED, Record
from data.cache.selection import Selection

Array = np.ndarray[Any, np.dtype[Any]]
MASS_ROUNDING = 1e-3  # largest deviation of Σ p from 1, and of a log-probability above 0
LABEL_TOLERANCE = 0.05  # nats between a label's log-probability and that of the entry with its id


@dataclass(frozen=True)
class Columns:
    """The N positions of several records.

    Shapes: `tokens`, `labels`, `tail` and `label_logs` [N], `entry_ids` and `entry_logs` [N, K] (log-probabilities),
    `samples` and `sample_logs` [N, S]. `tempered` has one tail [N] for each further temperature of the selection.
    """

    tokens: Array
    labels: Array
    entry_ids: Array
    entry_logs: Array
    tail: Array
    label_logs: Array
    tempered: tuple[Array, ...]
    samples: Array
    sample_logs: Array

    @classmethod
    def from_records(cls, records: Sequence[Record], temperatures: Sequence[float]) -> "Columns":
        """Concatenates records, with entries and samples padded to the widest record."""
        samples = [record.samples() for record in records]
        # Inputs are the first T of T + 1 token ids, labels the last T.
        return cls(
            np.concatenate([r.token_ids[:-1] for r in records]).astype(np.int64),
            np.concatenate([r.token_ids[1:] for r in records]).astype(np.int64),
            _stack([r.topk_token_ids for r in records], 0).astype(np.int64),
            _stack([r.topk_log_probs for r in records], UNUSED).astype(np.float32),
            np.concatenate([r.tail_log_prob for r in records]).astype(np.float32),
            np.concatenate([r.label_log_prob for r in records]).astype(np.float32),
            tuple(np.concatenate([r.tempered_tails[t] for r in records]).astype(np.float32) for t in temperatures),
            _stack([ids for ids, _ in samples], 0).astype(np.int64),
            _stack([weights for _, weights in samples], UNUSED).astype(np.float32),
        )

    def label_entries(self) -> Array:
        """Returns the log-probability of each label's entry, or −inf where the label is not an entry.  [N]"""
        return np.where(self.entry_ids == self.labels[:, None], self.entry_logs, UNUSED).max(axis=1, initial=UNUSED)

    def check(self, vocab_size: int, selection: Selection) -> None:
        """Checks that a teacher can have produced these values.

        Raises:
            ValueError: an id is outside the vocabulary, a log-probability is NaN or above 0, entries and tail do not
                sum to 1, or a label's log-probability is not that of its entry. The message names the column.
        """
        for name in ("tokens", "labels", "entry_ids", "samples"):
            values = getattr(self, name)
            if values.size and not 0 <= int(values.min()) <= int(values.max()) < vocab_size:
                raise ValueError(f"{name}: ids {values.min()} to {values.max()}; the vocabulary has {vocab_size}")
        for name in ("entry_logs", "tail", "label_logs"):
            values = getattr(self, name)
            if np.isnan(values).any() or (values > MASS_ROUNDING).any():
                raise ValueError(f"{name}: holds NaN or a log-probability above 0")
        if np.isnan(self.sample_logs).any() or any(np.isnan(tail).any() for tail in self.tempered):
            raise ValueError("samples or tails at further temperatures: hold NaN")
        # Σ e^entry + e^tail is 1 up to rounding.  [N]
        mass = np.exp(self.entry_logs.astype(np.float64)).sum(axis=1) + np.exp(self.tail.astype(np.float64))
        if (np.abs(mass - 1) > MASS_ROUNDING).any():
            raise ValueError(f"entries and tail sum to {mass[np.abs(mass - 1).argmax()]:.6f}, wanted 1")
        # Where the label is an entry, both of its log-probabilities agree. −inf is left out of the difference.  [N]
        entries = self.label_entries()
        is_entry = entries > UNUSED
        distance = np.subtract(entries, self.label_logs, where=is_entry, out=np.zeros_like(entries))
        differs = is_entry & (np.abs(distance) > LABEL_TOLERANCE)
        if selection.top_k and differs.any():
            n = int(differs.argmax())
            raise ValueError(
                f"position {n}: the label's log-probability is {self.label_logs[n]:.3f}, that of its entry "
                f"{entries[n]:.3f}; labels and entries belong to different positions"
            )


def _stack(parts: Sequence[Array], filler: float) -> Array:
    """Concatenates the rows of all parts, padded with `filler` to the widest."""
    width = max(part.shape[1] for part in parts)
    wide = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=filler) for part in parts]
    return np.concatenate(wide)


def _by_id(ids: Array, logs: Array) -> tuple[Array, Array]:
    """Sorts each row's entries by rising id, for comparison, and cuts the rows to the widest one.

    Unused entries come last, all with the same id.
    """
    used = logs > UNUSED
    widest = int(used.sum(axis=1).max(initial=0))
    keys = np.where(used, ids, np.iinfo(np.int64).max)
    order = np.argsort(keys, axis=1, kind="stable")
    return np.take_along_axis(keys, order, 1)[:, :widest], np.take_along_axis(logs, order, 1)[:, :widest]


def measure_codec_error(original: Columns, decoded: Columns) -> dict[str, float]:
    """Measures what coding changed: KL(original‖decoded) over entries and tail, in nats, and the entries' mass.

    Returns `kl_mean` and `kl_worst` over the positions, and the worst `mass_error`.

    Raises:
        ValueError: anything but log-probabilities changed.
    """
    # Sort both by id: the codec does not keep the order of entries.  [N, K], [N, S]
    ids, logs = _by_id(original.entry_ids, original.entry_logs)
    ids_after, logs_after = _by_id(decoded.entry_ids, decoded.entry_logs)
    samples, samples_after = (_by_id(side.samples, side.sample_logs)[0] for side in (original, decoded))
    same = {
        "tokens": np.array_equal(original.tokens, decoded.tokens) and np.array_equal(original.labels, decoded.labels),
        "ids": np.array_equal(ids, ids_after),
        "samples": np.array_equal(samples, samples_after),
    }
    for name, unchanged in same.items():
        if not unchanged:
            raise ValueError(f"{name} came back changed from the codec; nothing was written")
    # log p of the entries and the tail, before and after.  [N, K + 1]
    before = np.concatenate([logs, original.tail[:, None]], axis=1).astype(np.float64)
    after = np.concatenate([logs_after, decoded.tail[:, None]], axis=1).astype(np.float64)
    # KL = Σ p (log p − log q), where terms of p = 0 are 0.  [N]
    used = before > UNUSED
    kl = np.where(used, np.exp(before) * np.subtract(before, after, where=used, out=np.zeros_like(before)), 0.0).sum(
        axis=1
    )
    # |Σ q − Σ p| over the entries.  [N]
    mass = np.abs(np.exp(logs_after.astype(np.float64)).sum(axis=1) - np.exp(logs.astype(np.float64)).sum(axis=1))
    return {"kl_mean": float(kl.mean()), "kl_worst": float(kl.max()), "mass_error": float(mass.max())}
