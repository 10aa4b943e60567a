"""Statistics and audit of a cache, added up block by block for its manifest."""

import numpy as np

from data.cache.manifest import Audit, Manifest
from data.cache.record import UNUSED
from data.stream.shards import WrittenBlock


class Totals:
    """Sums over all positions of a cache."""

    def __init__(self) -> None:
        self.positions = self.entries = self.scored = 0
        self.nll = self.mass = self.kl = 0.0
        self.kl_worst = self.mass_error = 0.0

    @classmethod
    def of(cls, grown_from: Manifest | None) -> "Totals":
        """Nothing yet, or what the manifest of a cache that grows has."""
        totals = cls()
        if grown_from:
            found, n = grown_from.statistics, grown_from.positions
            totals.positions, totals.scored = n, round(found["scored"] * n)
            totals.entries = round(found["entries"] * n)
            totals.nll, totals.mass = found["teacher_nll"] * totals.scored, found["teacher_mass"] * totals.scored
            totals.kl, totals.kl_worst = grown_from.audit.kl_mean * n, grown_from.audit.kl_worst
            totals.mass_error = grown_from.audit.mass_error
        return totals

    def add(self, written: WrittenBlock) -> None:
        """Count a block in."""
        positions = sum(written.block.lengths)
        for record in written.records:
            mask = record.loss_mask.astype(bool)
            self.nll -= float(record.label_log_prob[mask].astype(np.float64).sum())
            self.mass += float(np.exp(record.topk_log_probs[mask].astype(np.float64)).sum())
            self.entries += sum(int((logs > UNUSED).sum()) for logs in (record.topk_log_probs, record.samples()[1]))
            self.scored += int(mask.sum())
        audit = written.header.audit
        self.positions += positions
        self.kl += positions * audit["kl_mean"]
        self.kl_worst = max(self.kl_worst, audit["kl_worst"])
        self.mass_error = max(self.mass_error, audit["mass_error"])

    def audit(self) -> Audit:
        """Of the codec."""
        return Audit(self.kl / self.positions, self.kl_worst, self.mass_error)

    def statistics(self) -> dict[str, float]:
        """Of the teacher over scored positions; entries stored a position, and the share that is scored."""
        return {
            "teacher_nll": self.nll / self.scored,
            "teacher_mass": self.mass / self.scored,
            "entries": self.entries / self.positions,
            "scored": self.scored / self.positions,
        }
