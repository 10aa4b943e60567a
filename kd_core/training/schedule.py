"""Learning-rate schedules as pure functions of the step, so that nothing needs saving."""

import math
from dataclasses import dataclass

from kd_core.errors import UsageError


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, cosine decay to `min_ratio` of the peak, then constant for the last `constant_steps`."""

    warmup_steps: int = 5
    constant_steps: int = 0
    min_ratio: float = 0.0

    def check(self, steps: int) -> None:
        """Refuse a schedule that does not fit into `steps`.

        Raises:
            UsageError: warm-up and constant part are negative or longer than the run, or the ratio is not in [0, 1].
        """
        for name in ("warmup_steps", "constant_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"schedule.{name}: got {getattr(self, name)}; wanted at least 0.")
        if self.warmup_steps + self.constant_steps > steps:
            raise UsageError(
                f"schedule: warmup_steps {self.warmup_steps} + constant_steps {self.constant_steps} is more than "
                f"steps {steps}. Shorten them or train longer."
            )
        if not 0 <= self.min_ratio <= 1:
            raise UsageError(f"schedule.min_ratio: got {self.min_ratio}; wanted 0 to 1.")

    def factor(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate for step 1 … `steps`; the floor is reached on the step after the decay."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        decay = steps - self.constant_steps - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / (decay + 1))
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
