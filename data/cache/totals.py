"""Sums over the positions of blocks, shards and caches: the codec's error, and statistics of the teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from data.cache.codec.header import Header
from data.cache.record import UNUSED, Record

RELATIVE, ABSOLUTE = 1e-6, 1e-12  # tolerances of a comparison, since the order of a sum may differ


@dataclass(frozen=True)
class Audit:
    """The codec's error over all positions: KL(original‖decoded) in nats, and the worst error of the entries' mass."""

    kl_mean: float
    kl_worst: float
    mass_error: float


@dataclass(frozen=True)
class Totals:
    """Sums over some positions, in nats and in mass. `nll` and `mass` are over the scored ones."""

    positions: int = 0
    entries: int = 0
    scored: int = 0
    nll: float = 0.0
    mass: float = 0.0
    kl_sum: float = 0.0
    kl_worst: float = 0.0
    mass_error: float = 0.0

    @classmethod
    def from_block(cls, header: Header, records: Sequence[Record]) -> "Totals":
        """Adds up the positions of a decoded block."""
        nll, mass, entries, scored = 0.0, 0.0, 0, 0
        for record in records:
            mask = record.loss_mask.astype(bool)
            nll -= float(record.label_log_prob[mask].astype(np.float64).sum())
            mass += float(np.exp(record.topk_log_probs[mask].astype(np.float64)).sum())
            entries += sum(int((logs > UNUSED).sum()) for logs in (record.topk_log_probs, record.samples()[1]))
            scored += int(mask.sum())
        positions, audit = header.positions, header.audit
        return cls(
            positions, entries, scored, nll, mass,
            positions * audit["kl_mean"], audit["kl_worst"], audit["mass_error"],
        )  # fmt: skip

    def __add__(self, other: "Totals") -> "Totals":
        """Returns the sums over the positions of both. The codec's worst errors are those of either."""
        return Totals(
            self.positions + other.positions, self.entries + other.entries, self.scored + other.scored,
            self.nll + other.nll, self.mass + other.mass,
            self.kl_sum + other.kl_sum, max(self.kl_worst, other.kl_worst), max(self.mass_error, other.mass_error),
        )  # fmt: skip

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

    def differing(self, statistics: Mapping[str, float], audit: Audit) -> list[str]:
        """Describes each figure of a manifest that does not match these sums."""
        computed, recorded = (
            {
                **{f"statistics.{name}": value for name, value in means.items()},
                **{f"audit.{name}": value for name, value in asdict(errors).items()},
            }
            for means, errors in ((self.statistics(), self.audit()), (statistics, audit))
        )
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
