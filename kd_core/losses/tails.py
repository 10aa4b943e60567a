"""Tail treatments: what becomes of the teacher's mass outside its K entries. Each turns a view into events.

With M the teacher's mass on the support S, r = 1 − M its tail, A and s the student's. A teacher at temperature τ
has probabilities ∝ p^(1/τ), so only what S alone determines can be had at τ ≠ 1 without a captured tail.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kd_core.losses.sparse_view import Events, SparseView, events, log_softmax_over

# A tail that was recorded as exactly nothing counts as e^−30: below what float32 can tell from a mass of 1, and
# without it any divergence that asks log p of the student's mass there is infinite.
EMPTY_TAIL = -30.0


class Temperatures(NamedTuple):
    """Of teacher and student. The view that a tail treatment gets has the student's applied already, but for
    `renormalized`, which needs only the support's logits and so divides by itself."""

    teacher: float = 1.0
    student: float = 1.0


def _teacher_at(view: SparseView, temperature: float) -> tuple[Tensor, Tensor]:
    """The teacher's entries and tail at a temperature whose tail was captured."""
    if temperature == 1:
        return view.teacher_log_probs, view.teacher_tail
    tail = dict(view.tempered_tails)[temperature]
    entries = view.teacher_log_probs / temperature
    normaliser = torch.logaddexp(entries.logsumexp(dim=1), tail)
    return entries - normaliser[:, None], tail - normaliser


def tail_bucket(view: SparseView, at: Temperatures) -> Events:
    """K + 1 events: each entry, and everything else as one (the ghost token). A lower bound of the full divergence.

    Megatron-LM, TRL. Blind to how the tail's mass is spread, not to how much it is.
    """
    entries, tail = _teacher_at(view, at.teacher)
    tail = torch.where(tail > -torch.inf, tail, EMPTY_TAIL)
    exists = (view.tail_size > 0)[:, None]
    return events(
        torch.cat([entries, tail[:, None]], dim=1),
        torch.cat([view.student_log_probs, view.student_tail[:, None]], dim=1),
        torch.cat([view.used(), exists], dim=1),
        torch.cat([view.student_relative(), view.tail_relative()[:, None]], dim=1),
    )


def renormalized(view: SparseView, at: Temperatures) -> Events:
    """K events, both sides renormalised on them: p / M and q / A (NeMo-Aligner, NeMo-RL, ModelOpt).

    Blind to everything outside: the student may put any mass there at no cost.
    """
    used = view.used()
    teacher = log_softmax_over(view.teacher_log_probs / at.teacher, used)
    return events(teacher, log_softmax_over(view.student_relative() / at.student, used), used)


def truncated(view: SparseView, at: Temperatures) -> Events:
    """K events, the teacher renormalised, p / M, the student not (DistillKit "zero", Axolotl).

    Biased: the gradient is not 0 where the student equals the teacher.
    """
    used = view.used()
    return events(log_softmax_over(view.teacher_log_probs / at.teacher, used), view.student_log_probs, used)


def unnormalized(view: SparseView, at: Temperatures) -> Events:
    """K events of true probability and no tail (verl): the sum can go negative."""
    del at
    return events(view.teacher_log_probs, view.student_log_probs, view.used())


def uniform_tail(view: SparseView, at: Temperatures) -> Events:
    """The tail's mass r spread evenly over its tokens (DistillKit): forward KL over all V, given that guess.

    Σ over the tail of r/n · (log r/n − log q_j), with n tokens in it, is r · (log r − (log n + mean log q_j)):
    one event whose "student" is log n + mean log q_j. That is no probability, so forward KL alone can use it.
    """
    del at
    exists = (view.tail_size > 0) & (view.teacher_tail > -torch.inf)
    student = view.student_tail_mean + view.tail_size.clamp(min=1).to(view.student_tail_mean.dtype).log()
    return events(
        torch.cat([view.teacher_log_probs, view.teacher_tail[:, None]], dim=1),
        torch.cat([view.student_log_probs, student[:, None]], dim=1),
        torch.cat([view.used(), exists[:, None]], dim=1),
    )


def residual_to_label(view: SparseView, at: Temperatures) -> Events:
    """The tail's mass given to the label: K entries (the label's grows by r), or one more event for it.

    The naive mend of top-k. Biased towards the label by r, so no 0 gradient where the student equals the teacher.
    """
    del at
    tail = view.teacher_tail[:, None]
    entries = torch.where(view.is_label, torch.logaddexp(view.teacher_log_probs, tail), view.teacher_log_probs)
    outside = ~view.is_label.any(dim=1, keepdim=True) & (tail > -torch.inf)
    return events(
        torch.cat([entries, tail], dim=1),
        torch.cat([view.student_log_probs, view.student_label[:, None]], dim=1),
        torch.cat([view.used(), outside], dim=1),
    )


def sampled(view: SparseView, at: Temperatures) -> Events:
    """Entries drawn from a proposal; their `log_probs` are log importance weights, Σ w = 1 in expectation.

    Random Sampling KD (arXiv 2503.16870). E[Σ w f(id)] = Σ p f over the whole vocabulary, so the gradient of
    forward KL and the value of cross-entropy are unbiased, whatever the tail. The value of forward KL is the one
    to the drawn sample, above the true one by a number that the student cannot change.
    """
    return unnormalized(view, at)


TAILS: dict[str, Callable[[SparseView, Temperatures], Events]] = {
    "tail_bucket": tail_bucket,
    "renormalized": renormalized,
    "truncated": truncated,
    "unnormalized": unnormalized,
    "uniform_tail": uniform_tail,
    "residual_to_label": residual_to_label,
    "sampled": sampled,
}
