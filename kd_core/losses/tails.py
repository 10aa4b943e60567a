"""Tail treatments: functions that turn a view into events, and so decide how mass outside the K entries counts.

M is the teacher's mass on the support S and r = 1 − M its tail. A and s are the same of the student. At temperature τ
the teacher's probabilities are ∝ p^(1/τ). So at τ ≠ 1 a treatment either uses S alone, or needs a tail that the cache
captured at τ.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kd_core.losses.divergences import DIVERGENCES
from kd_core.losses.sparse_view import Events, SparseView, log_softmax_over, make_events

# Log mass of a tail that was recorded as exactly 0. It is too small to change a float32 sum near 1. With −inf instead,
# every divergence would be infinite that multiplies log p of the tail with the student's mass there.
EMPTY_TAIL = -30.0


class Temperatures(NamedTuple):
    """Temperatures of teacher and student.

    The view is already at the student's temperature, except for `renormalized`. That one needs the logits of the
    support alone, so it gets the view at 1 and divides by the temperature itself.
    """

    teacher: float = 1.0
    student: float = 1.0


def _teacher_at(view: SparseView, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns log p of the teacher's entries [n, K] and of its tail [n] at a temperature whose tail was captured."""
    if temperature == 1:
        return view.teacher_log_probs, view.teacher_tail
    # p_k^(1/τ) of each entry, and the captured Σ p^(1/τ) over all other tokens, both as logs.  [n, K] and [n]
    tail = dict(view.tempered_tails)[temperature]
    entries = view.teacher_log_probs / temperature
    # Divide both by their sum, which is the normaliser over the whole vocabulary.  [n]
    normaliser = torch.logaddexp(entries.logsumexp(dim=1), tail)
    return entries - normaliser[:, None], tail - normaliser


def tail_bucket(view: SparseView, temperatures: Temperatures) -> Events:
    """Builds K + 1 events: each entry, and all other tokens as one, the "ghost token" (Megatron-LM, TRL).

    The divergence is a lower bound of the one over the full vocabulary. It depends on how much mass the tail has, not
    on how that mass is spread.
    """
    entries, tail = _teacher_at(view, temperatures.teacher)
    # Keep log p of an empty tail finite. Where S is the whole vocabulary, the bucket is an unused event.  [n]
    tail = torch.where(tail > -torch.inf, tail, EMPTY_TAIL)
    exists = (view.tail_size > 0)[:, None]
    # The bucket is the last event.  [n, K + 1]
    return make_events(
        torch.cat([entries, tail[:, None]], dim=1),
        torch.cat([view.student_log_probs, view.student_tail[:, None]], dim=1),
        torch.cat([view.used(), exists], dim=1),
        lambda: torch.cat([view.student_relative(), view.tail_relative()[:, None]], dim=1),
    )


def renormalized(view: SparseView, temperatures: Temperatures) -> Events:
    """Builds K events with both sides renormalised on them: p / M and q / A (NeMo-Aligner, NeMo-RL, ModelOpt).

    The divergence ignores everything outside S. The student may put any mass there at no cost.
    """
    # Softmax of log p / τ and of logits / τ on S: the normaliser over the vocabulary cancels.  [n, K]
    used = view.used()
    teacher = log_softmax_over(view.teacher_log_probs / temperatures.teacher, used)
    return make_events(teacher, log_softmax_over(view.student_relative() / temperatures.student, used), used)


def truncated(view: SparseView, temperatures: Temperatures) -> Events:
    """Builds K events with the teacher alone renormalised: p / M against q (DistillKit "zero", Axolotl).

    It is biased: the gradient is not 0 where the student equals the teacher.
    """
    used = view.used()
    return make_events(
        log_softmax_over(view.teacher_log_probs / temperatures.teacher, used), view.student_log_probs, used
    )


def unnormalized(view: SparseView, temperatures: Temperatures) -> Events:
    """Builds K events of true probabilities, p against q, and no tail (verl). The divergence can be negative."""
    del temperatures
    return make_events(view.teacher_log_probs, view.student_log_probs, view.used())


def uniform_tail(view: SparseView, temperatures: Temperatures) -> Events:
    """Builds the events of forward KL over all V, with the tail's mass r spread evenly over its tokens (DistillKit).

    With n tokens in the tail, their part of forward KL is one event whose "student" is log n + mean log q_j:

        Σ_tail r/n · (log r/n − log q_j) = r · (log r − (log n + mean log q_j))

    That is not a log-probability, so forward KL alone can use it.
    """
    del temperatures
    exists = (view.tail_size > 0) & (view.teacher_tail > -torch.inf)
    # log n + mean log q_j. The clamp keeps log n finite where the tail has no token.  [n]
    student = view.student_tail_mean + view.tail_size.clamp(min=1).to(view.student_tail_mean.dtype).log()
    return make_events(
        torch.cat([view.teacher_log_probs, view.teacher_tail[:, None]], dim=1),
        torch.cat([view.student_log_probs, student[:, None]], dim=1),
        torch.cat([view.used(), exists[:, None]], dim=1),
    )


def residual_to_label(view: SparseView, temperatures: Temperatures) -> Events:
    """Builds events in which the label gets the tail's mass: its entry grows by r, or it becomes one more event.

    This is the naive repair of top-k. It is biased towards the label by r, so the gradient is not 0 where the student
    equals the teacher.
    """
    del temperatures
    tail = view.teacher_tail[:, None]
    # log(p + r) where the label is an entry.  [n, K]
    entries = torch.where(view.is_label, torch.logaddexp(view.teacher_log_probs, tail), view.teacher_log_probs)
    # Otherwise the label is the last event, of mass r.  [n, 1]
    outside = ~view.is_label.any(dim=1, keepdim=True) & (tail > -torch.inf)
    return make_events(
        torch.cat([entries, tail], dim=1),
        torch.cat([view.student_log_probs, view.student_label[:, None]], dim=1),
        torch.cat([view.used(), outside], dim=1),
    )


def sampled(view: SparseView, temperatures: Temperatures) -> Events:
    """Builds K events from entries drawn from a proposal (Random Sampling KD, arXiv 2503.16870).

    Their `log_probs` are logs of importance weights w, with Σ w = 1 in expectation. E[Σ w f(id)] = Σ p f over the
    whole vocabulary. So the gradient of forward KL and the value of cross-entropy are unbiased, whatever the tail. The
    value of forward KL is that to the drawn sample, which exceeds the true one by a constant to the student.
    """
    return unnormalized(view, temperatures)


class Tail(NamedTuple):
    """A tail treatment as an objective names it, and what it goes with.

    Args:
        function: turns a view into events.
        divergences: those that are defined on its events.
        reason: why it allows no other divergence, for the error message.
        tempered: true if it allows a teacher at τ ≠ 1. Others would need probabilities that the entries do not hold.
        support_only: true if it reads the student's logits on the support alone, up to a constant per position.
        needs_tail_mean: true if it reads the view's `student_tail_mean`, which costs a pass over the vocabulary.
        needs_mass: true if it reads the teacher's true mass of the entries, which some sources of caches lack.
        needs_tail: true if it treats a tail, so that there must be one.
        sampled: true if it takes sampled entries, false if it takes the likeliest ones.
    """

    function: Callable[[SparseView, Temperatures], Events]
    divergences: tuple[str, ...]
    reason: str = ""
    tempered: bool = False
    support_only: bool = False
    needs_tail_mean: bool = False
    needs_mass: bool = True
    needs_tail: bool = False
    sampled: bool = False


# Divergences whose terms are all weighted by p. They need nothing of events that a tail treatment leaves out.
TEACHER_WEIGHTED = ("forward_kl", "cross_entropy", "skew_kl")
BY_STUDENT = "it weighs events by the student, and this tail leaves out the student's mass outside the entries"
TAILS = {
    "tail_bucket": Tail(tail_bucket, tuple(DIVERGENCES), tempered=True, needs_tail=True),
    "renormalized": Tail(
        renormalized,
        tuple(name for name in DIVERGENCES if name != "decoupled_kl"),
        "most of the tail that it weighs separately is missing",
        tempered=True,
        support_only=True,
        needs_mass=False,
    ),
    "truncated": Tail(truncated, TEACHER_WEIGHTED, BY_STUDENT, tempered=True, needs_mass=False),
    "unnormalized": Tail(unnormalized, TEACHER_WEIGHTED, BY_STUDENT),
    "uniform_tail": Tail(
        uniform_tail,
        ("forward_kl",),
        "the guessed tail is known only on average, which only forward KL can use",
        needs_tail_mean=True,
        needs_tail=True,
    ),
    "residual_to_label": Tail(
        residual_to_label,
        ("forward_kl", "cross_entropy"),
        "a teacher with all its tail on the label is a target for the forward forms only",
        needs_tail=True,
    ),
    "sampled": Tail(
        sampled,
        ("forward_kl", "cross_entropy"),
        "importance weights estimate sums over the teacher, and only the forward forms are such sums",
        sampled=True,
    ),
}
