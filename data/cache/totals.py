"""Sums over the blocks of a cache, for the manifest: the codec's error, and statistics of the teacher."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.cache.codec.header import Header
from data.cache.manifest import Audit, Manifest
from data.cache.record import UNUSED, Record

RELATIVE, ABSOLUTE = 1e-6, 1e-12  # tolerances of a comparison, since the order of a sum may differ


class BlockSums(NamedTuple):
    """Sums over the positions of one block. `records` has the NLL and the mass of each record's scored positions."""

    records: list[tuple[float, float]]
    entries: int
    scored: int
    positions: int
    audit: Mapping[str, float]

    @classmethod
    def from_block(cls, header: Header, records: Sequence[Record]) -> "BlockSums":
        """Adds up the positions of a decoded block."""
        sums, entries, scored = list[tuple[float, float]](), 0, 0
        for record in records:
            mask = record.loss_mask.astype(bool)
            nll = -float(record.label_log_prob[mask].astype(np.float64).sum())
            sums.append((nll, float(np.exp(record.topk_log_probs[mask].astype(np.float64)).sum())))
            entries += sum(int((logs > UNUSED).sum()) for logs in (record.topk_log_probs, record.samples()[1]))
            scored += int(mask.sum())
        return cls(sums, entries, scored, header.positions, header.audit)


class Totals:
    """Sums over the positions of a cache, in nats and in mass."""

    def __init__(self) -> None:
        self.positions = self.entries = self.scored = 0
        self.nll, self.mass = 0.0, 0.0
        self.kl_sum, self.kl_worst, self.mass_error = 0.0, 0.0, 0.0

    @classmethod
    def from_manifest(cls, manifest: Manifest | None) -> "Totals":
        """Recovers the sums behind a manifest's means, for a cache that grows. Without a manifest, all are 0."""
        totals = cls()
        if manifest:
            means, n = manifest.statistics, manifest.positions
            totals.positions, totals.scored, totals.entries = n, round(means["scored"] * n), round(means["entries"] * n)
            totals.nll, totals.mass = means["teacher_nll"] * totals.scored, means["teacher_mass"] * totals.scored
            totals.kl_sum, totals.kl_worst = manifest.audit.kl_mean * n, manifest.audit.kl_worst
            totals.mass_error = manifest.audit.mass_error
        return totals

    def add(self, block: BlockSums) -> None:
        """Adds a block. Records are added one by one, so that the sums do not depend on who has read which block."""
        for nll, mass in block.records:
            self.nll += nll
            self.mass += mass
        self.entries += block.entries
        self.scored += block.scored
        self.positions += block.positions
        self.kl_sum += block.positions * block.audit["kl_mean"]
        self.kl_worst = max(self.kl_worst, block.audit["kl_worst"])
        self.mass_error = max(self.mass_error, block.audit["mass_error"])

    def statistics(self) -> dict[str, float]:
        """Returns the manifest's `statistics`.

        `teacher_nll` and `teacher_mass` are means over scored positions. `entries` is the mean number of entries and
        samples a position, and `scored` the share of scored positions.
        """
        return {
            "teacher_nll": self.nll / max(1, self.scored),
            "teacher_mass": self.mass / max(1, self.scored),
            "entries": self.entries / self.positions,
            "scored": self.scored / self.positions,
        }

    def audit(self) -> Audit:
        """Returns the codec's error over all positions."""
        return Audit(self.kl_sum / self.positions, self.kl_worst, self.mass_error)

    def differing(self, manifest: Manifest) -> list[str]:
        """Describes each figure of the manifest that does not match these sums."""
        audit = self.audit()
        computed = {
            **{f"statistics.{name}": value for name, value in self.statistics().items()},
            "audit.kl_mean": audit.kl_mean,
            "audit.kl_worst": audit.kl_worst,
            "audit.mass_error": audit.mass_error,
        }
        recorded = {
            **{f"statistics.{name}": value for name, value in manifest.statistics.items()},
            "audit.kl_mean": manifest.audit.kl_mean,
            "audit.kl_worst": manifest.audit.kl_worst,
            "audit.mass_error": manifest.audit.mass_error,
        }
        missing = [
            f"{name} is missing; the blocks give {value:.9g}"
            for name, value in computed.items()
            if name not in recorded
        ]
        return missing + [
            f"{name} is {recorded[name]:.9g}; the blocks give {value:.9g}"
            for name, value in computed.items()
            if name in recorded and not abs(recorded[name] - value) <= ABSOLUTE + RELATIVE * abs(value)
        ]
