"""Sums over the blocks of a cache: what the codec changed and what the teacher said, as the manifest has them."""

import numpy as np

from data.cache.manifest import Audit, Manifest
from data.cache.record import UNUSED
from data.cache.walk import Visited

RELATIVE, ABSOLUTE = 1e-6, 1e-12  # the order of a sum may differ


class Totals:
    """Sums over positions."""

    def __init__(self) -> None:
        self.positions = 0
        self.sums = dict.fromkeys(("teacher_nll", "teacher_mass", "entries", "scored"), 0.0)
        self.kl_sum, self.kl_worst, self.mass_error = 0.0, 0.0, 0.0

    def add(self, visited: Visited) -> None:
        """Count a block in."""
        for record in visited.records:
            probs = np.exp(record.topk_log_probs.astype(np.float64))
            self.sums["teacher_nll"] -= float(record.label_log_prob.astype(np.float64).sum())
            self.sums["teacher_mass"] += float(probs.sum())
            self.sums["entries"] += int((probs > 0).sum()) + int((record.samples()[1] > UNUSED).sum())
            self.sums["scored"] += int(record.loss_mask.sum())
        audit, positions = visited.header.audit, visited.header.positions
        self.positions += positions
        self.kl_sum += positions * audit["kl_mean"]
        self.kl_worst = max(self.kl_worst, audit["kl_worst"])
        self.mass_error = max(self.mass_error, audit["mass_error"])

    def statistics(self) -> dict[str, float]:
        """Means over positions."""
        return {name: value / self.positions for name, value in self.sums.items()}

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
