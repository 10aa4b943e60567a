"""Sums over the blocks of a cache: what the codec changed and what the teacher said, as the manifest has them."""

from collections.abc import Sequence

import numpy as np

from data.cache.codec.header import Header
from data.cache.manifest import Audit, Manifest
from data.cache.record import UNUSED, Record

RELATIVE, ABSOLUTE = 1e-6, 1e-12  # the order of a sum may differ


class Totals:
    """Sums over positions."""

    def __init__(self) -> None:
        self.positions = self.entries = self.scored = 0
        self.nll, self.mass = 0.0, 0.0
        self.kl_sum, self.kl_worst, self.mass_error = 0.0, 0.0, 0.0

    @classmethod
    def of(cls, manifest: Manifest | None) -> "Totals":
        """Those behind a manifest, for a cache that grows; without one, nothing yet."""
        totals = cls()
        if manifest:
            found, n = manifest.statistics, manifest.positions
            totals.positions, totals.scored, totals.entries = n, round(found["scored"] * n), round(found["entries"] * n)
            totals.nll, totals.mass = found["teacher_nll"] * totals.scored, found["teacher_mass"] * totals.scored
            totals.kl_sum, totals.kl_worst = manifest.audit.kl_mean * n, manifest.audit.kl_worst
            totals.mass_error = manifest.audit.mass_error
        return totals

    def add(self, header: Header, records: Sequence[Record]) -> None:
        """Count a block in."""
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
        """Of the teacher over scored positions; entries stored a position, and the share that is scored."""
        return {
            "teacher_nll": self.nll / max(1, self.scored),
            "teacher_mass": self.mass / max(1, self.scored),
            "entries": self.entries / self.positions,
            "scored": self.scored / self.positions,
        }

    def audit(self) -> Audit:
        """Of the codec."""
        return Audit(self.kl_sum / self.positions, self.kl_worst, self.mass_error)

    def differing(self, manifest: Manifest) -> list[str]:
        """Figures of the manifest that are not those of its blocks."""
        audit = self.audit()
        found = {
            **{f"statistics.{name}": value for name, value in self.statistics().items()},
            "audit.kl_mean": audit.kl_mean,
            "audit.kl_worst": audit.kl_worst,
            "audit.mass_error": audit.mass_error,
        }
        wanted = {
            **{f"statistics.{name}": value for name, value in manifest.statistics.items()},
            "audit.kl_mean": manifest.audit.kl_mean,
            "audit.kl_worst": manifest.audit.kl_worst,
            "audit.mass_error": manifest.audit.mass_error,
        }
        missing = [
            f"{name} is missing; the blocks give {value:.9g}" for name, value in found.items() if name not in wanted
        ]
        return missing + [
            f"{name} is {wanted[name]:.9g}; the blocks give {value:.9g}"
            for name, value in found.items()
            if name in wanted and not abs(wanted[name] - value) <= ABSOLUTE + RELATIVE * abs(value)
        ]
