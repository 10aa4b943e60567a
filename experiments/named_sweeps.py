"""Sweeps that run by name: `python -m launchers.sweep --sweep=NAME`. Each docstring begins with its question."""

from experiments.base.sweep_definition import Sweep, grid, log_uniform, random, seeds, together, zipped
from experiments.half_depth import quickstart


def lr_by_step_size() -> Sweep:
    """Which learning rate suits which number of tokens a step, at the same number of tokens in all?

    Expected: larger steps need a higher rate. 1,024 tokens at 4e-4 is near the best (see `quickstart`).
    Seen:     not run yet.
    """
    sizes = zipped({"tokens_per_step": [512, 1024, 2048], "steps": [120, 60, 30]})
    return Sweep(quickstart) * sizes * grid("optimizer.lr", [2e-4, 4e-4, 8e-4]) * seeds(2)


def weights_at_random() -> Sweep:
    """How sensitive is the student to the learning rate and the distillation weight, searched at random?

    Expected: a plateau around a rate of 4e-4 and a weight of 0.9.
    Seen:     not run yet.
    """
    draws = together(
        random("optimizer.lr", log_uniform(1e-4, 1e-3), 12),
        random("loss.terms.kd.weight", log_uniform(0.3, 3.0), 12),
    )
    return Sweep(quickstart) * draws
