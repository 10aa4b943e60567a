"""Divergences between teacher and student, in nats per position.

p is the teacher's probability of an event, q the student's. Sums run over the E events that a tail treatment made
(`tails.py`). Both fused passes and vocabulary-parallel code call these functions, so each formula is written once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.losses.sparse_view import Events, log_softmax_over
from kd_core.ranges import AT_LEAST_1, NOT_NEGATIVE, SHARE, Range


class Parameters(NamedTuple):
    """Parameters of single divergences. `DIVERGENCES` says which one reads which."""

    beta: float = 0.5
    skew: float = 0.1
    reverse_share: float = 0.5
    head_mass: float = 0.5
    head_size: int = 10
    head_weight: float = 1.0
    tail_weight: float = 1.0


PARAMETER_RANGES: dict[str, Range] = {
    "beta": SHARE,
    "skew": SHARE,
    "reverse_share": SHARE,
    "head_mass": SHARE,
    "head_size": AT_LEAST_1,
    "head_weight": NOT_NEGATIVE,
    "tail_weight": NOT_NEGATIVE,
}


def log_mixture(log_ratio: Tensor, share: float) -> Tensor:
    """Computes log(1 − share + share · e^log_ratio), to full relative precision also where it is near 0.

    Near 0, logaddexp loses all digits to rounding, which matters because JSD divides by a small share. Far from 0,
    the form by log1p and expm1 overflows. So each is used where it is exact.
    """
    # A mixture of one side alone.
    if share == 0:
        return torch.zeros_like(log_ratio)
    if share == 1:
        return log_ratio
    # Both forms are computed everywhere. The clamp keeps the one that is not chosen finite, in its gradient too.
    if share <= 0.5:
        # log(1 + share (e^x − 1)), exact for x near 0. Above 60, e^x comes close to overflow.  [n, E]
        beyond = log_ratio > 60
        near = torch.log1p(share * torch.expm1(log_ratio.clamp(max=60)))
    else:
        # x + log(1 + (1 − share) (e^−x − 1)): the same with e^x taken out, exact for share near 1.  [n, E]
        beyond = log_ratio < -1
        inside = log_ratio.clamp(min=-1)
        near = inside + torch.log1p((1 - share) * torch.expm1(-inside))
    # log(e^log(1 − share) + e^(log share + x)), exact where the result is not near 0.  [n, E]
    far = torch.logaddexp(torch.full_like(log_ratio, math.log1p(-share)), math.log(share) + log_ratio)
    return torch.where(beyond, far, near)


def forward_kl(events: Events, _: Parameters) -> Float[Tensor, " n"]:
    """Computes KL(p‖q) = Σ p (log p − log q) (Hinton et al., arXiv 1503.02531). It covers all modes of the teacher."""
    return (events.teacher_probs() * events.log_ratio()).sum(dim=1)


def cross_entropy(events: Events, _: Parameters) -> Float[Tensor, " n"]:
    """Computes −Σ p log q, as Hinton et al. wrote it: forward KL plus the teacher's entropy, with the same gradient."""
    return -(events.teacher_probs() * events.student).sum(dim=1)


def reverse_kl(events: Events, _: Parameters) -> Float[Tensor, " n"]:
    """Computes KL(q‖p) = Σ q (log q − log p) (MiniLLM, arXiv 2306.08543). It seeks a mode of the teacher."""
    return -(events.student_probs() * events.log_ratio()).sum(dim=1)


def jsd(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """Computes KL(p‖m) / (1 − β) + KL(q‖m) / β with m = β p + (1 − β) q.

    This is GKD's generalised JSD (arXiv 2306.13649), divided by β (1 − β). GKD's β KL(p‖m) + (1 − β) KL(q‖m)
    vanishes at β = 0 and 1. The scaled form tends to forward KL at 0 and to reverse KL at 1. At β = ½ it is 4 times
    the textbook's JSD.
    """
    # The limits at both ends, where the form below would be 0 / 0.
    beta = parameters.beta
    if beta in (0, 1):
        return (forward_kl if beta == 0 else reverse_kl)(events, parameters)
    # log m/p = log(β + (1 − β) q/p) and log m/q = log(β p/q + 1 − β), in a form that stays exact at small β.  [n, E]
    ratio = events.log_ratio()
    to_teacher = -(events.teacher_probs() * log_mixture(-ratio, 1 - beta)).sum(dim=1)
    to_student = -(events.student_probs() * log_mixture(ratio, beta)).sum(dim=1)
    return to_teacher / (1 - beta) + to_student / beta


def skew_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """Computes KL(p ‖ α p + (1 − α) q), α = `skew` (DistiLLM, arXiv 2402.03898).

    At α = 0 it is forward KL. Otherwise it is bounded above, by −log α.
    """
    # −log m/p with m/p = α + (1 − α) q/p.  [n, E]
    return -(events.teacher_probs() * log_mixture(-events.log_ratio(), 1 - parameters.skew)).sum(dim=1)


def skew_reverse_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """Computes KL(q ‖ (1 − α) p + α q), α = `skew` (DistiLLM, arXiv 2402.03898). At α = 0 it is reverse KL."""
    # −log m/q with m/q = (1 − α) p/q + α.  [n, E]
    return -(events.student_probs() * log_mixture(events.log_ratio(), 1 - parameters.skew)).sum(dim=1)


def mixed_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """Computes (1 − λ) KL(p‖q) + λ KL(q‖p), λ = `reverse_share`."""
    share = parameters.reverse_share
    return (1 - share) * forward_kl(events, parameters) + share * reverse_kl(events, parameters)


def adaptive_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """Computes g_head/(g_head + g_rest) KL(p‖q) + g_rest/(g_head + g_rest) KL(q‖p) (AKL, arXiv 2404.02657).

    The head holds the teacher's likeliest events whose cumulated mass is at most `head_mass` (μ), and always the
    likeliest one. g_head and g_rest are the sums of |p − q| over the head and over the rest. Both shares are constants
    to the gradient. All this is as in the authors' code (wutaiqiang/LLM_KD_AKL), but where p = q. There the shares are
    0/0, and each is set to ½. The bucket of a tail is an event like the others.
    """
    # Rank the events by the teacher, and gather the gaps |p − q| in that order.  [n, E]
    p, q = events.teacher_probs(), events.student_probs().detach()
    ranked, order = p.sort(dim=1, descending=True, stable=True)
    gaps = (p - q).abs().gather(1, order)
    # Split them where the cumulated mass of the teacher exceeds μ. The first is always in the head.  [n, E]
    rest = ranked.cumsum(dim=1) > parameters.head_mass
    rest[:, 0] = False
    g_head, g_rest = torch.where(rest, 0.0, gaps).sum(dim=1), torch.where(rest, gaps, 0.0).sum(dim=1)
    # Share of forward KL. The inner `where` avoids 0/0, whose NaN the outer one would hide in the value alone.  [n]
    total = g_head + g_rest
    head = torch.where(total > 0, g_head / torch.where(total > 0, total, 1.0), 0.5)
    return head * forward_kl(events, parameters) + (1 - head) * reverse_kl(events, parameters)


def total_variation(events: Events, _: Parameters) -> Float[Tensor, " n"]:
    """Computes ½ Σ |p − q|: a probability, 0 to 1, not nats. A speculative decoder accepts 1 minus it."""
    return 0.5 * (events.teacher_probs() - events.student_probs()).abs().sum(dim=1)


def decoupled_kl(events: Events, parameters: Parameters) -> Float[Tensor, " n"]:
    """Computes w_head · (Σ_head p log p/q + r log r/s) + w_tail · r KL(p/r ‖ q/s).

    r and s are the masses of p and q outside the head (arXiv 2602.20816, "Don't Ignore the Tail", eq. 3). The head
    holds the teacher's `head_size` likeliest entries. Its tail holds the other entries, and the bucket as one event.
    A head of all K entries gives forward KL, and so do both weights at 1. The paper's w_tail is β / mean of r over
    the sequence (β = 2, a head of 10). A loss here sees positions without their sequence, so divide β by the mean of
    r over the cache.
    """
    assert events.student_relative is not None, "decoupled_kl is for the tail bucket alone"
    # Rank of each entry by the teacher, 0 the likeliest. The bucket is the last event and always in the tail.  [n, K]
    p = events.teacher_probs()
    rank = p[:, :-1].argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    in_tail = torch.nn.functional.pad(rank >= parameters.head_size, (0, 1), value=True) & events.used
    # log p/r and log q/s of the events in the tail, and 0 in the head.  [n, K + 1]
    tail_p, tail_q = (log_softmax_over(log_probs, in_tail) for log_probs in (events.teacher, events.student_relative()))
    # r KL(p/r ‖ q/s) by event. The rest of forward KL is the head's term: Σ_head p log p/q + r log r/s.  [n, K + 1]
    within = p * (tail_p - tail_q)
    return (parameters.head_weight * (p * events.log_ratio() - within) + parameters.tail_weight * within).sum(dim=1)


class Divergence(NamedTuple):
    """A divergence as an objective names it. `parameters` are the fields of `Parameters` that it reads."""

    function: Callable[[Events, Parameters], Tensor]
    parameters: tuple[str, ...] = ()


DIVERGENCES = {
    "forward_kl": Divergence(forward_kl),
    "cross_entropy": Divergence(cross_entropy),
    "reverse_kl": Divergence(reverse_kl),
    "jsd": Divergence(jsd, ("beta",)),
    "skew_kl": Divergence(skew_kl, ("skew",)),
    "skew_reverse_kl": Divergence(skew_reverse_kl, ("skew",)),
    "mixed_kl": Divergence(mixed_kl, ("reverse_share",)),
    "adaptive_kl": Divergence(adaptive_kl, ("head_mass",)),
    "total_variation": Divergence(total_variation),
    "decoupled_kl": Divergence(decoupled_kl, ("head_size", "head_weight", "tail_weight")),
}
