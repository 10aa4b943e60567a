"""Sums over the blocks of a cache, for the manifest: the codec's error, and statistics of the teacher."""

from collections.abc import Sequence

import numpy as np

from data.cache.codec.header import Header
from data.cache.manifest import Audit, Manifest
from data.cache.record import UNUSED, Record

RELATIVE, ABSOLUTE = 1e-6, 1e-12  # tolerances of a comparison, since the order of a sum may differ


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

    def add(self, header: Header, records: Sequence[Record]) -> None:
        """Adds a block."""
        for record in records:
            mask = record.loss_mask.astype(bool)
            self.nll -= float(record.label_log_prob[mask].astype(np.float64).sum())
            self.mass += float(np.exp(record.topk_log_probs[mask].astype(np.float64)).sum())
            self.entries += sum(int((logs > UNUSED).sum()) for logs in (record.topk_log_probs, record.samples()[1]))
            self.scored += int(mask.sum())
        self.positions += header.positions
        self.kl_sum += header.positions * header.audit["kl_mean"]
        self.kl_worst = max(self.kl_worst, header.audit["kl_worst"])
        self.mass_error = max(self.mass_error, header.audit["mass_error"])

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
