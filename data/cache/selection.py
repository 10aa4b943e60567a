"""What is kept of a teacher's distribution at each position."""

from dataclasses import dataclass

from kd_core.errors import UsageError
from kd_core.ranges import ABOVE_0, SHARE_ABOVE_0, SHARE_BELOW_1, check_ranges


@dataclass(frozen=True)
class Selection:
    """The head: the likeliest tokens, as far as all three limits allow. The samples: draws from all the others.

    A fixed top-k is `top_k` alone; a threshold p ≥ ε is `min_prob`; a nucleus is `mass` (the entry that reaches it is
    in). `top_k=0` with `draws` samples the whole distribution (Random Sampling KD, arXiv 2503.16870): several times
    smaller, and unbiased for forward KL, but of no use to the other divergences. Head and samples serve both.

    Args:
        top_k: at most so many entries; 0 for samples alone.
        min_prob: entries of at least this probability.
        mass: entries until they hold this mass.
        draws: tokens drawn, with replacement, from what is not in the head; equal ones are stored once.
        proposal_temperature: they are drawn from p^(1/t), normalised, and weighted back. 1 has the smallest cache.
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
        check_ranges(
            self, "selection.", min_prob=SHARE_BELOW_1, mass=SHARE_ABOVE_0, proposal_temperature=ABOVE_0,
            tail_temperatures=ABOVE_0,
        )  # fmt: skip
        if self.draws > 65535 or self.top_k > 65535:
            raise UsageError("selection: wanted top_k and draws of at most 65,535.")
        if 1.0 in self.tail_temperatures or len(set(self.tail_temperatures)) < len(self.tail_temperatures):
            raise UsageError("selection.tail_temperatures: each once, and without 1, which is always recorded.")

    @property
    def fixed(self) -> bool:
        """Whether every position has `top_k` entries."""
        return self.min_prob <= 0 and self.mass >= 1

    def words(self) -> str:
        """The selection in words, for people."""
        head = [f"top {self.top_k}"] if self.top_k else []
        head += [f"p ≥ {self.min_prob:g}"] if self.top_k and self.min_prob else []
        head += [f"mass ≥ {self.mass:g}"] if self.top_k and self.mass < 1 else []
        draws = [f"{self.draws} draws" + (" from the tail" if self.top_k else "")] if self.draws else []
        return " and ".join([", ".join(head)] * bool(head) + draws)
