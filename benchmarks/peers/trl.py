"""TRL 1.16.0 (Apache-2.0): the tail bucket of its sparse teachers, and GKD's dense one.

experimental/async_distillation/async_distillation_trainer.py, experimental/server_distillation/
server_distillation_trainer.py, experimental/gkd/gkd_trainer.py.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.inputs import Inputs, mean, wide

CHUNK = 256


def _with_tail(log_probs: Tensor) -> Tensor:
    """One more column: the log of what is missing to 1 (at least about 1e-7)."""
    mass = log_probs.logsumexp(dim=1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_probs, torch.log(-torch.expm1(mass))], dim=1)


def _values(logits: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
    student = _with_tail(logits.log_softmax(dim=1).gather(1, ids))
    teacher = _with_tail(teacher)
    return (teacher.exp() * (teacher - student)).sum(dim=1)


def _chunk(hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    # The original multiplies in float32 whatever the model's dtype is.
    values = _values(wide(hidden) @ wide(weight).T, ids, teacher)
    return torch.where(mask, values, 0.0).sum()


def chunked_tail(given: Inputs) -> Tensor:
    """Async distillation, `add_tail_bucket`: chunks of 256 positions under a checkpoint."""
    total = given.hidden.new_zeros((), dtype=torch.float32)
    parts = (given.hidden, given.teacher.ids, given.teacher.log_probs, given.mask)
    for hidden, ids, teacher, mask in zip(*(x.split(CHUNK) for x in parts), strict=True):
        total = total + checkpoint(_chunk, hidden, given.weight, ids, teacher, mask, use_reentrant=False)
    return total / given.mask.sum().clamp(min=1)


def server_tail(given: Inputs) -> Tensor:
    """Server distillation, `loss_add_tail`: the same from logits of all positions."""
    logits = wide(given.hidden @ given.weight.T)
    return mean(_values(logits, given.teacher.ids, given.teacher.log_probs), given.mask)


def dense_teacher(given: Inputs) -> Tensor:
    """GKD at beta 0, which takes dense logits: the teacher rebuilt with its tail spread evenly over the others."""
    logits = given.hidden @ given.weight.T
    student = wide(logits).log_softmax(dim=1)
    ids, log_probs, tail, _ = given.teacher
    each = tail - math.log(student.shape[1] - ids.shape[1])
    teacher = each[:, None].expand_as(student).clone().scatter_(1, ids, log_probs)
    kl = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True)
    return mean(kl.sum(dim=1), given.mask)
