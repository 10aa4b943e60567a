"""From logits of the whole vocabulary to what a selection keeps of them: head, tail, label, samples.

The tail is summed over what the head leaves, never as 1 − Σp. One softmax in place gives its log-sum-exp as (largest
logit − its log-probability), which on a CPU is many times faster than `torch.logsumexp` (denormal numbers on peaked
rows), and leaves the distribution within the tail in the place of the logits: samples are drawn from it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.cache.selection import Selection

UNUSED = -torch.inf
RUN = 256  # neighbours that a draw first chooses between as one
LOWEST_EXPONENT = -80.0  # e^−80 is nothing beside 1, and anything below it is slow


class Scores(NamedTuple):
    """What a teacher said at N positions, in nats. An entry or sample of −inf is not used."""

    ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    tail_log_prob: Float[Tensor, " N"]
    label_log_prob: Float[Tensor, " N"]
    tempered_tails: Float[Tensor, "N temperatures"]
    sampled_ids: Int[Tensor, "N S"]
    sampled_log_weights: Float[Tensor, "N S"]


def select(
    logits: Float[Tensor, "n V"], labels: Int[Tensor, " n"], selection: Selection, uniforms: Float[Tensor, "n S"]
) -> Scores:
    """Scores from logits, which are overwritten. `uniforms` in [0, 1) decide the draws."""
    values, ids = logits.topk(selection.top_k)
    label = logits.gather(1, labels[:, None]).squeeze(1)
    logits.scatter_(1, ids, -torch.inf)
    largest = logits.amax(dim=1)
    tempered = [_log_sum_exp(logits, largest, temperature) for temperature in selection.tail_temperatures]
    tail = largest - torch.softmax(logits, dim=1, out=logits).amax(dim=1).log()
    normaliser = torch.logaddexp(values.logsumexp(dim=1), tail)
    log_probs, tail = values - normaliser[:, None], tail - normaliser
    tempered = [
        whole - normaliser / temperature
        for whole, temperature in zip(tempered, selection.tail_temperatures, strict=True)
    ]
    if not selection.fixed:
        lost = torch.where(_kept(log_probs, selection), UNUSED, log_probs)
        log_probs = torch.where(lost > UNUSED, UNUSED, log_probs)
        before, tail = tail, torch.logaddexp(tail, lost.logsumexp(dim=1))
        tempered = [
            torch.logaddexp(of_tail, (lost / temperature).logsumexp(dim=1))
            for of_tail, temperature in zip(tempered, selection.tail_temperatures, strict=True)
        ]
        if selection.draws:
            logits.mul_((before - tail).exp()[:, None]).scatter_(1, ids, (lost - tail[:, None]).exp())
    samples, weights = _draw(logits, uniforms, selection.proposal_temperature)
    return Scores(
        ids,
        log_probs,
        tail,
        label - normaliser,
        torch.stack(tempered, dim=1) if tempered else tail.new_empty(len(tail), 0),
        samples,
        weights + tail[:, None],
    )


def _log_sum_exp(logits: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """log Σ e^(logit/τ)."""
    shifted = ((logits - largest[:, None]) / temperature).clamp_(min=LOWEST_EXPONENT).exp_()
    return shifted.sum(dim=1).log() + largest / temperature


def _kept(log_probs: Tensor, selection: Selection) -> Tensor:
    """Which of entries in falling order the limits keep."""
    probs = log_probs.double().exp()
    floor = torch.tensor(selection.min_prob, dtype=torch.float64).log()
    return (log_probs >= floor) & (probs.cumsum(dim=1) - probs < selection.mass)


def _draw(tail: Float[Tensor, "n V"], uniforms: Float[Tensor, "n S"], temperature: float) -> tuple[Tensor, Tensor]:
    """Ids drawn from the distribution within the tail, equal ones once, and log Σ of their weights (1 in all).

    With a proposal q ∝ p^(1/t), a draw counts p / q / S. Overwrites `tail` where t is not 1.
    """
    n, S = uniforms.shape
    if not S:
        return uniforms.new_zeros((n, 0), dtype=torch.int64), tail.new_zeros((n, 0))
    proposal = tail if temperature == 1 else tail.pow_(1 / temperature)
    drawn, total = _inverse(proposal, uniforms)
    ids, counts = _distinct(drawn)
    weights = (counts / S).log()
    if temperature != 1:
        chosen = proposal.gather(1, ids).double()  # p^(1/t); p / q = p · total / p^(1/t)
        weights = weights + (temperature - 1) * chosen.log() + total.log()[:, None]
    return ids, torch.where(counts > 0, weights, UNUSED).float()


def _inverse(weights: Float[Tensor, "n V"], uniforms: Float[Tensor, "n S"]) -> tuple[Tensor, Tensor]:
    """The inverse of the cumulated weights at `uniforms`, and their sum; first the run, then the token in it.

    Runs are cumulated in float64: over a whole vocabulary, float32 would lose the rare tokens.
    """
    n, V = weights.shape
    whole = V // RUN * RUN
    sums = torch.cat([weights[:, :whole].view(n, -1, RUN).sum(dim=2), weights[:, whole:].sum(dim=1)[:, None]], dim=1)
    sums = sums.double()
    ends = sums.cumsum(dim=1)
    target = uniforms.double() * ends[:, -1:]
    run = torch.searchsorted(ends, target, right=True).clamp(max=sums.shape[1] - 1)
    left = target - (ends - sums).gather(1, run)
    at = run[:, :, None] * RUN + torch.arange(RUN, device=weights.device)
    inside = weights.gather(1, at.clamp(max=V - 1).flatten(1)).view(at.shape).double()
    inside = torch.where(at < V, inside, 0.0)
    token = (inside.cumsum(dim=2) <= left[:, :, None]).sum(dim=2)
    # Rounding may point behind a run's last token that has any weight.
    last = RUN - 1 - (inside > 0).flip(2).to(torch.uint8).argmax(dim=2)
    return run * RUN + torch.minimum(token, last), ends[:, -1]


def _distinct(drawn: Int[Tensor, "n S"]) -> tuple[Tensor, Tensor]:
    """Each id once, in rising order, and how often it was drawn; 0 times behind the last."""
    ordered = drawn.sort(dim=1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = first.cumsum(dim=1) - 1
    counts = torch.zeros_like(ordered).scatter_add_(1, place, torch.ones_like(ordered))
    return torch.zeros_like(ordered).scatter_(1, place, ordered), counts
