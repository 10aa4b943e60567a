"""Divergences over events, in nats a position: the one place where a formula of the family is written.

p is the teacher's probability of an event, q the student's, and sums run over the events that a tail treatment
made (`tails.py`). Dense, fused and vocabulary-parallel code all call these.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.losses.sparse_view import Events, log_softmax_over


class Parameters(NamedTuple):
    """Numbers of the divergences that have any; each is used by the one that its comment names."""

    beta: float = 0.5  # jsd
    skew: float = 0.1  # skew_kl, skew_reverse_kl
    reverse_share: float = 0.5  # mixed_kl
    head_mass: float = 0.5  # adaptive_kl
    head_size: int = 10  # decoupled_kl
    head_weight: float = 1.0  # decoupled_kl
    tail_weight: float = 1.0  # decoupled_kl


def log_mixture(log_ratio: Tensor, share: float) -> Tensor:
    """log(1 − share + share · e^log_ratio), to full relative precision also where it is near 0.

    Near 0 the naive form loses everything to rounding, and JSD divides by a small share; far from 0 the form
    that is exact there overflows.
    """
    if share == 0:
        return torch.zeros_like(log_ratio)
    if share == 1:
        return log_ratio
    # Both forms are computed everywhere: the clamp keeps the one that is not chosen finite, in gradient too.
    if share <= 0.5:
        beyond = log_ratio > 60
        near = torch.log1p(share * torch.expm1(log_ratio.clamp(max=60)))
    else:
        beyond = log_ratio < -1
        inside = log_ratio.clamp(min=-1)
        near = inside + torch.log1p((1 - share) * torch.expm1(-inside))
    far = torch.logaddexp(torch.full_like(log_ratio, math.log1p(-share)), math.log(share) + log_ratio)
    return torch.where(beyond, far, near)


def forward_kl(events: Events, _: Parameters) -> Float[Tensor, " n"]:
    """KL(p‖q) = Σ p (log p − log q). Covers all modes of the teacher (Hinton et al., arXiv 1503.02531)."""
    return (events.teacher_probs() * events.log_ratio()).sum(dim=1)


def cross_entropy(events: Events, _: Parameters) -> Float[Tensor, " n"]:
    """−Σ p log q, the form that Hinton et al. wrote: forward KL plus the teacher's entropy, with its gradient."""
    return -(events.teacher_probs() * events.student).sum(dim=1)


def reverse_kl(events: Events, _: Parameters) -> Float[Tensor, " n"]:
    """KL(q‖p) = Σ q (log q − log p). Seeks a mode of the teacher (MiniLLM, arXiv 2306.08543)."""
    return -(events.student_probs() * events.log_ratio()).sum(dim=1)


def jsd(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """KL(p‖m) / (1 − β) + KL(q‖m) / β with m = β p + (1 − β) q: GKD's generalised JSD (arXiv 2306.13649), scaled.

    GKD's own β KL(p‖m) + (1 − β) KL(q‖m) vanishes at β = 0 and 1; this is it divided by β (1 − β), which tends
    to forward KL at 0 and to reverse KL at 1. At β = ½ it is 4 times the textbook's JSD.
    """
    beta = parameters.beta
    if beta in (0, 1):
        return (forward_kl if beta == 0 else reverse_kl)(events, parameters)
    ratio = events.log_ratio()
    to_teacher = -(events.teacher_probs() * log_mixture(-ratio, 1 - beta)).sum(dim=1)
    to_student = -(events.student_probs() * log_mixture(ratio, beta)).sum(dim=1)
    return to_teacher / (1 - beta) + to_student / beta


def skew_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """KL(p ‖ α p + (1 − α) q), α = `skew` (DistiLLM, arXiv 2402.03898). At α = 0 it is forward KL; bounded above."""
    return -(events.teacher_probs() * log_mixture(-events.log_ratio(), 1 - parameters.skew)).sum(dim=1)


def skew_reverse_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """KL(q ‖ (1 − α) p + α q), α = `skew` (DistiLLM, arXiv 2402.03898). At α = 0 it is reverse KL."""
    return -(events.student_probs() * log_mixture(events.log_ratio(), 1 - parameters.skew)).sum(dim=1)


def mixed_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """(1 − λ) KL(p‖q) + λ KL(q‖p), λ = `reverse_share`."""
    share = parameters.reverse_share
    return (1 - share) * forward_kl(events, parameters) + share * reverse_kl(events, parameters)


def adaptive_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """g_head/(g_head + g_rest) KL(p‖q) + g_rest/(g_head + g_rest) KL(q‖p) (AKL, arXiv 2404.02657).

    The head is the teacher's likeliest events whose cumulated mass is at most `head_mass` (μ), and always the first;
    g is the sum of |p − q| over head and rest. The two shares are constants to the gradient. Both as in the authors'
    code (wutaiqiang/LLM_KD_AKL), which is 0/0 where p = q: there each gets a half. The bucket of a tail counts as
    an event like the others.
    """
    p, q = events.teacher_probs(), events.student_probs().detach()
    ranked, order = p.sort(dim=1, descending=True, stable=True)
    gaps = (p - q).abs().gather(1, order)
    rest = ranked.cumsum(dim=1) > parameters.head_mass
    rest[:, 0] = False
    g_head, g_rest = torch.where(rest, 0.0, gaps).sum(dim=1), torch.where(rest, gaps, 0.0).sum(dim=1)
    total = g_head + g_rest
    head = torch.where(total > 0, g_head / torch.where(total > 0, total, 1.0), 0.5)
    return head * forward_kl(events, parameters) + (1 - head) * reverse_kl(events, parameters)


def total_variation(events: Events, _: Parameters) -> Float[Tensor, " n"]:
    """½ Σ |p − q|, in probability, 0 to 1 (no nats). 1 minus it is what a speculative decoder accepts."""
    return 0.5 * (events.teacher_probs() - events.student_probs()).abs().sum(dim=1)


def decoupled_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """w_head · (Σ_head p log p/q + r log r/s) + w_tail · r KL(p/r ‖ q/s), r and s the masses outside the head.

    "Don't Ignore the Tail" (arXiv 2602.20816, eq. 3) with the teacher's `head_size` likeliest entries as head; the
    other entries and the bucket, one event, are its tail, so a head of all K entries leaves forward KL. That is
    also what both weights at 1 give. The paper's w_tail is β over the sequence's mean r (β = 2, a head of 10): a
    position knows no sequence here, so divide β by the mean over the cache.
    """
    assert events.student_relative is not None, "decoupled_kl is for the tail bucket alone"
    p = events.teacher_probs()
    rank = p[:, :-1].argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    in_tail = torch.nn.functional.pad(rank >= parameters.head_size, (0, 1), value=True) & events.used
    tail_p, tail_q = (log_softmax_over(side, in_tail) for side in (events.teacher, events.student_relative))
    within = p * (tail_p - tail_q)
    return (parameters.head_weight * (p * events.log_ratio() - within) + parameters.tail_weight * within).sum(dim=1)


DIVERGENCES: dict[str, Callable[[Events, Parameters], Tensor]] = {
    "forward_kl": forward_kl,
    "cross_entropy": cross_entropy,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "mixed_kl": mixed_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "decoupled_kl": decoupled_kl,
}
