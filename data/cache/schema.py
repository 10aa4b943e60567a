"""A record of the cache, and how it lies in a tar: one member a field, plain little-endian arrays under zstd.

A record is a window of one document. With T positions and K entries, its members are

    NAME.json                 {"positions": T, "entries": K, "document": …, "start": …}
    NAME.token_ids.zst        uint32 [T + 1]   input tokens are [:-1], labels are [1:]
    NAME.loss_mask.zst        uint8  [T]
    NAME.topk_token_ids.zst   uint32 [T, K]    in falling order of probability
    NAME.topk_log_probs.zst   float32 [T, K]   true log-probabilities, in nats
    NAME.tail_log_prob.zst    float32 [T]      log of the mass outside the entries
    NAME.label_log_prob.zst   float32 [T]
"""

import json
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import zstandard

from kd_core.errors import UsageError

FIELDS = {
    "token_ids": "<u4",
    "loss_mask": "<u1",
    "topk_token_ids": "<u4",
    "topk_log_probs": "<f4",
    "tail_log_prob": "<f4",
    "label_log_prob": "<f4",
}
MASS_ROUNDING = 1e-3
MAX_POSITIONS = 1 << 24
MAX_ENTRIES = 1 << 20
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Record:
    """T scored positions of one document, with what the teacher said at each."""

    name: str
    document: str
    start: int
    token_ids: Array
    loss_mask: Array
    topk_token_ids: Array
    topk_log_probs: Array
    tail_log_prob: Array
    label_log_prob: Array

    @property
    def positions(self) -> int:
        """T."""
        return len(self.loss_mask)

    def with_top_k(self, k: int) -> Self:
        """The record as it would be with `k` entries: what is cut off goes to the tail."""
        if k >= self.topk_token_ids.shape[1]:
            return self
        cut = np.logaddexp.reduce(self.topk_log_probs[:, k:].astype(np.float64), axis=1)
        tail = np.logaddexp(cut, self.tail_log_prob.astype(np.float64)).astype(np.float32)
        return replace(
            self,
            topk_token_ids=self.topk_token_ids[:, :k],
            topk_log_probs=self.topk_log_probs[:, :k],
            tail_log_prob=tail,
        )


def encode(record: Record) -> dict[str, bytes]:
    """Members of a record by suffix, in their order."""
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True, write_content_size=True)
    T, K = record.topk_token_ids.shape
    header = {"positions": T, "entries": K, "document": record.document, "start": record.start}
    members = {"json": json.dumps(header, sort_keys=True).encode()}
    for field, dtype in FIELDS.items():
        payload = np.ascontiguousarray(getattr(record, field), dtype).tobytes()
        members[f"{field}.zst"] = compressor.compress(payload)
    return members


def _shapes(positions: int, entries: int) -> dict[str, tuple[int, ...]]:
    flat, wide = (positions,), (positions, entries)
    return {
        "token_ids": (positions + 1,),
        "loss_mask": flat,
        "topk_token_ids": wide,
        "topk_log_probs": wide,
        "tail_log_prob": flat,
        "label_log_prob": flat,
    }


def _read_array(payload: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    """Decompress to exactly `shape`; a declared size that differs is refused before anything is allocated."""
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    declared = zstandard.get_frame_parameters(payload).content_size
    if declared != wanted:
        raise ValueError(f"holds {declared} bytes, wanted {wanted} for shape {shape} of {dtype}")
    raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=wanted)
    return np.frombuffer(raw, dtype).reshape(shape)


def _check(record: Record, vocab_size: int) -> None:
    """Values that no teacher can have said."""
    for field in ("token_ids", "topk_token_ids"):
        largest = int(getattr(record, field).max())
        if largest >= vocab_size:
            raise ValueError(f"{field}: id {largest} is outside the vocabulary of {vocab_size}")
    for field in ("topk_log_probs", "tail_log_prob", "label_log_prob"):
        values = getattr(record, field)
        if np.isnan(values).any() or (values > MASS_ROUNDING).any():
            raise ValueError(f"{field}: holds NaN or a log-probability above 0")
    mass = np.exp(record.topk_log_probs.astype(np.float64)).sum(axis=1) + np.exp(record.tail_log_prob)
    if (np.abs(mass - 1) > MASS_ROUNDING).any():
        raise ValueError(f"entries and tail sum to {mass[np.abs(mass - 1).argmax()]:.6f}, wanted 1")
    if (record.loss_mask > 1).any():
        raise ValueError(f"loss_mask: holds {record.loss_mask.max()}, wanted 0 or 1")


def decode(name: str, members: dict[str, bytes], vocab_size: int, where: str) -> Record:
    """A record from its members; strict.

    Raises:
        UsageError: a member is missing, unknown, damaged, of another size, or holds an impossible value; the
            message names `where` (the shard), the record and the member.
    """
    wanted = {"json", *(f"{field}.zst" for field in FIELDS)}
    if set(members) != wanted:
        raise UsageError(
            f"{where}: record {name} has members {sorted(members)}; wanted {sorted(wanted)}. Export the shard again."
        )
    member = "json"
    try:
        header = json.loads(members["json"])
        T, K = int(header["positions"]), int(header["entries"])
        if not (0 < T <= MAX_POSITIONS and 0 < K <= MAX_ENTRIES):
            raise ValueError(f"declares {T} positions of {K} entries")
        arrays: dict[str, Array] = {}
        for field, shape in _shapes(T, K).items():
            member = f"{field}.zst"
            arrays[field] = _read_array(members[member], FIELDS[field], shape)
        record = Record(name=name, document=str(header["document"]), start=int(header["start"]), **arrays)
        member = "values"
        _check(record, vocab_size)
    except (ValueError, KeyError, TypeError, zstandard.ZstdError) as error:
        raise UsageError(f"{where}: record {name}, {member}: {error}. Export the shard again.") from None
    return record
