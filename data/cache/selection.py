"""The settings that say how much of a teacher's distribution a cache stores at each position."""

from dataclasses import dataclass

from kd_core.errors import UsageError
from kd_core.ranges import ABOVE_0, SHARE_ABOVE_0, SHARE_BELOW_1, check_settings


@dataclass(frozen=True)
class Selection:
    """Limits on what a cache keeps of a position: entries (the likeliest tokens), and samples of all others.

    `top_k` alone keeps a fixed top-k, `min_prob` a threshold p ≥ ε, and `mass` a nucleus.
    `top_k=0` with `draws` samples the whole distribution (Random Sampling KD, arXiv 2503.16870). Such a cache is
    several times smaller, and unbiased for forward KL, but of no use to the other divergences.
    Entries and samples together serve both.

    Args:
        top_k: keeps at most so many entries. 0 keeps samples alone.
        min_prob: keeps entries of at least this probability.
        mass: keeps entries until they hold this mass, the one that reaches it included.
        draws: tokens drawn, with replacement, from all that are not entries. Equal ones are stored once.
        proposal_temperature: draws come from p^(1/t), normalised, and are weighted back. 1 gives the smallest cache.
        tail_temperatures: further temperatures τ at which the tail's Σ p^(1/τ) is recorded, for bucket losses at τ.
    """

    top_k: int = 64
    min_prob: float = 0.0
    mass: float = 1.0
    draws: int = 0
    proposal_temperature: float = 1.0
    tail_temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.top_k < 0 or self.draws < 0 or self.top_k + self.draws == 0:
            raise UsageError(
                f"selection: top_k={self.top_k}, draws={self.draws} keep nothing; wanted one of them above 0."
            )
        check_settings(
            self, "selection.", min_prob=SHARE_BELOW_1, mass=SHARE_ABOVE_0, proposal_temperature=ABOVE_0,
            tail_temperatures=ABOVE_0,
        )  # fmt: skip
        if self.draws > 65535 or self.top_k > 65535:
            raise UsageError("selection: wanted top_k and draws of at most 65,535.")
        if 1.0 in self.tail_temperatures or len(set(self.tail_temperatures)) < len(self.tail_temperatures):
            raise UsageError("selection.tail_temperatures: each once, and without 1, which is always recorded.")

    @property
    def fixed(self) -> bool:
        """Returns whether every position has `top_k` entries."""
        return self.min_prob <= 0 and self.mass >= 1

    def words(self) -> str:
        """Describes the selection for people, such as `top 64, mass ≥ 0.9 and 12 draws from the tail`."""
        limits = [f"top {self.top_k}"] if self.top_k else []
        limits += [f"p ≥ {self.min_prob:g}"] if self.top_k and self.min_prob else []
        limits += [f"mass ≥ {self.mass:g}"] if self.top_k and self.mass < 1 else []
        draws = [f"{self.draws} draws" + (" from the tail" if self.top_k else "")] if self.draws else []
        return " and ".join([", ".join(limits)] * bool(limits) + draws)
