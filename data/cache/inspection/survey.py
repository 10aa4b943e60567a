"""Sums over a cache's blocks: its bytes by part, and how much of the teacher's distribution it holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from data.cache.inspection.scan import DecodedBlock, read_coding, scan_blocks
from data.cache.manifest import TABLES_FILE, Manifest
from data.cache.record import UNUSED, Array, Record
from data.cache.tar import END_OF_TAR
from data.storage.storage import storage_at
from kd_core.errors import UsageError

COVERAGE_K = (1, 8, 64)  # entries a position at which coverage is measured
PARTS = {
    "tokens.zst": "tokens and loss mask",
    "entries.zst": "ids of entries",
    "log_probs.zst": "log-probabilities",
    "samples.zst": "samples",
    "json": "json of blocks",
}
FRAMING = "tar headers and padding"


@dataclass
class CountSummary:
    """Mean, minimum and maximum of a count over positions."""

    total: int = 0
    positions: int = 0
    least: int | None = None
    most: int = 0

    def add(self, counts: Array) -> None:
        """Adds the counts of some positions."""
        self.total, self.positions = self.total + int(counts.sum()), self.positions + len(counts)
        self.least = min(int(counts.min()), math.inf if self.least is None else self.least)  # pyright: ignore[reportAttributeAccessIssue]
        self.most = max(self.most, int(counts.max()))

    @property
    def mean(self) -> float:
        """Returns the mean over positions."""
        return self.total / max(1, self.positions)


@dataclass
class Survey:
    """Sums over all blocks that were added.

    `nll` is in nats. `inside` counts the positions whose label is an entry or a sample. `mass` has the summed mass of
    the likeliest K entries by K, and of all entries under None.
    """

    positions: int = 0
    records: int = 0
    scored: int = 0
    nll: float = 0.0
    inside: int = 0
    mass: dict[int | None, float] = field(default_factory=dict)
    entries: CountSummary = field(default_factory=CountSummary)
    samples: CountSummary = field(default_factory=CountSummary)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, decoded: DecodedBlock) -> None:
        """Adds a block."""
        for member in decoded.members:
            self._part(PARTS[member.name.partition(".")[2]], len(member.payload))
            self._part(FRAMING, 512 + -len(member.payload) % 512)
        for record in decoded.records:
            self._add_record(record)

    def add_files(self, folder: Path | str, manifest: Manifest) -> None:
        """Adds the bytes outside the blocks: ends of tars, tables, manifest and plan."""
        self._part(FRAMING, len(END_OF_TAR) * len(manifest.shards))
        self._part(TABLES_FILE, int(manifest.tables["bytes"]))
        self._part("indexes", sum(shard.index["bytes"] for shard in manifest.shards if shard.index))
        storage = storage_at(folder)
        for name in ("manifest.json", "plan.json"):
            if (size := storage.size(name)) is not None:
                self._part(name, size)

    def _part(self, name: str, size: int) -> None:
        self.bytes[name] = self.bytes.get(name, 0) + size

    def _add_record(self, record: Record) -> None:
        self.records += 1
        self.positions += record.positions
        self.scored += int(record.loss_mask.sum())
        self.nll -= float(record.label_log_prob.astype(np.float64).sum())
        probs = -np.sort(-np.exp(record.topk_log_probs.astype(np.float64)), axis=1)
        # Mass of the likeliest K entries, summed over positions.
        for width in (*COVERAGE_K, None):  # a block may be narrower than the selection
            self.mass[width] = self.mass.get(width, 0.0) + float(probs[:, :width].sum())
        self.entries.add((record.topk_log_probs > UNUSED).sum(axis=1))
        ids, weights = record.samples()
        self.samples.add((weights > UNUSED).sum(axis=1))
        # Positions whose label is a used entry or sample.  [T, 1] against [T, K] and [T, S]
        labels = record.token_ids[1:, None]
        is_entry = ((record.topk_token_ids == labels) & (record.topk_log_probs > UNUSED)).any(axis=1)
        self.inside += int((is_entry | ((ids == labels) & (weights > UNUSED)).any(axis=1)).sum())

    def coverage(self, top_k: int) -> list[tuple[str, float]]:
        """Returns the teacher's mean mass on its likeliest K entries for each K below `top_k`, and on all of them."""
        named = [(f"K = {k}" if k else "all stored", mass) for k, mass in self.mass.items() if k is None or k < top_k]
        return [(name, mass / max(1, self.positions)) for name, mass in named] if top_k else []

    @property
    def total_bytes(self) -> int:
        """Returns the bytes of all files that belong to the cache."""
        return sum(self.bytes.values())


def survey_cache(
    folder: Path | str, manifest: Manifest, first: int, progress: Callable[[int], object]
) -> tuple[Survey, list[Record]]:
    """Reads a whole cache. Returns its survey, and its first so many records.

    Args:
        folder: the cache.
        manifest: its manifest.
        first: how many records to return at most.
        progress: called with the positions of each block that was read.

    Raises:
        UsageError: the cache is damaged.
    """

    def refuse(location: str, problem: str) -> NoReturn:
        raise UsageError(f"{folder}/{location}: {problem}. See all that is wrong by --verify.")

    survey, records = Survey(), list[Record]()
    for block in scan_blocks(folder, manifest, read_coding(folder, manifest, refuse), refuse):
        survey.add(block)
        records += block.records[: first - len(records)]
        progress(block.header.positions)
    survey.add_files(folder, manifest)
    return survey, records
