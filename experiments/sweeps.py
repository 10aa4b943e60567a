"""Sweeps that can be named: `python -m launchers.sweep --sweep=NAME`. Each opens with its question."""

from experiments.quickstart import quickstart
from experiments.sampled import sampled
from experiments.sweep import Sweep, grid, log_uniform, random, seeds, together, where, zipped


def tails_by_k() -> Sweep:
    """How much does the tail treatment matter as K shrinks?

    Expected: at K = 64 the bucket and the renormalised top-k are near each other, for the teacher's mass on 64 entries
              is .87; at K = 1 the renormalised one knows no probabilities at all, and the truncated one is biased.
    Seen:     not run yet.
    """
    tails = ["tail_bucket", "renormalized", "truncated"]
    return Sweep(quickstart) * grid("loss.terms.kd.tail", tails) * grid("shards.top_k", [1, 8, 64]) * seeds(3)


def lr_by_step_size() -> Sweep:
    """Which learning rate for which number of tokens a step, at the same tokens in all?

    Expected: larger steps want a higher rate; 1,024 tokens at 4e-4 is near the best (see `quickstart`).
    Seen:     not run yet.
    """
    sizes = zipped({"tokens_per_step": [512, 1024, 2048], "steps": [120, 60, 30]})
    return Sweep(quickstart) * sizes * grid("optimizer.lr", [2e-4, 4e-4, 8e-4]) * seeds(2)


def weights_at_random() -> Sweep:
    """How sensitive is the student to rate and weight of the distillation term, searched at random?

    Expected: a plateau around 4e-4 and 0.9.
    Seen:     not run yet.
    """
    draws = together(
        random("optimizer.lr", log_uniform(1e-4, 1e-3), 12),
        random("loss.terms.kd.weight", log_uniform(0.3, 3.0), 12),
    )
    return Sweep(quickstart) * draws


def draws_or_top() -> Sweep:
    """Drawn tokens against the top K of the same teacher, over learning rates.

    Expected: draws want no other rate than the top 64; the top 8 end above both.
    Seen:     not run yet.
    """
    rates, all_seeds = grid("optimizer.lr", [2e-4, 4e-4]), seeds(3)
    top = Sweep(quickstart) * grid("shards.top_k", [8, 64]) * rates * all_seeds
    return (
        top * where(lambda v: v["shards.top_k"] == 64 or v["optimizer.lr"] == 4e-4) + Sweep(sampled) * rates * all_seeds
    )
