"""DistillKit (Arcee, Apache-2.0): distillkit/lossfuncs/kl.py and common.py, at 361c7ac0 and a61c2e7d.

Logits of all positions in the model's dtype, one logsumexp in float32, and only the entries gathered. `zero` calls
the missing mass nothing; `symmetric_uniform` spreads it alike on both sides, so that the spread cancels and what is
left is one more event. (Its dense losses spread the teacher's alone, which is `uniform_tail`.)
"""

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, mean, wide

EPS = 1e-6


def _student(given: Inputs) -> Tensor:
    logits = given.hidden @ given.weight.T
    normaliser = wide(logits).logsumexp(dim=1, keepdim=True).to(logits.dtype)
    return wide(logits.gather(1, given.teacher.ids) - normaliser)


def _rest(log_probs: Tensor) -> Tensor:
    """log(1 − Σ p), with Σ p kept below 1."""
    mass = log_probs.logsumexp(dim=1).clamp(max=-EPS)
    return torch.where(mass > -1, torch.log(-torch.expm1(mass)), torch.log1p(-mass.exp()))


def zero(given: Inputs) -> Tensor:
    """KL of the renormalised entries to the student's full softmax."""
    teacher = given.teacher.log_probs.log_softmax(dim=1)
    return mean((teacher.exp() * (teacher - _student(given))).sum(dim=1), given.mask)


def symmetric_uniform(given: Inputs) -> Tensor:
    """The entries and the missing mass, as K + 1 events."""
    teacher, student = given.teacher.log_probs, _student(given)
    rest = _rest(teacher)
    missing = torch.where(rest.exp() > EPS, rest.exp() * (rest - _rest(student)), 0.0)
    return mean((teacher.exp() * (teacher - student)).sum(dim=1) + missing, given.mask)
