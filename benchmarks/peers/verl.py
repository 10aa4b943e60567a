"""verl and VeOmni (ByteDance, Apache-2.0): true probabilities on the entries and nothing for the rest.

verl: verl/trainer/distillation/fsdp/losses.py at d5dc65d0. VeOmni: veomni/ops/kernels/cross_entropy/
chunk_topk_distill.py at fc7cc87c, which also returns the label's log-probability and the entropy (left out here).
"""

import math

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, factors, mean, wide

CHUNK = 1024
LEAST = math.log(1e-8)


def fsdp(given: Inputs) -> Tensor:
    """Σ p (log p − log q), each log-probability at least log 1e-8, from logits of all positions."""
    logits = wide(given.hidden @ given.weight.T)
    student = logits.log_softmax(dim=1).gather(1, given.teacher.ids).clamp(min=LEAST)
    teacher = given.teacher.log_probs.clamp(min=LEAST)
    return mean((teacher.exp() * (teacher - student)).sum(dim=1), given.mask)


class _Recomputed(torch.autograd.Function):
    """Chunks in the forward pass, and all of them again in the backward pass; nothing of size V is kept."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids, teacher)
        each = []
        for rows, at, p in zip(hidden.split(CHUNK), ids.split(CHUNK), teacher.split(CHUNK), strict=True):
            student = wide(rows @ weight.T).log_softmax(dim=1).gather(1, at)
            each.append((p.exp() * (p - student)).sum(dim=1))
        return torch.cat(each)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, teacher = ctx.saved_tensors
        by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            p = teacher[rows].exp()
            slope = wide(hidden[rows] @ weight.T).softmax(dim=1).mul_(p.sum(dim=1, keepdim=True))
            slope.scatter_add_(1, ids[rows], -p).mul_(grads[0][rows, None])
            rounded = slope.to(hidden.dtype)
            by_hidden[rows] = rounded @ weight
            by_weight += rounded.T @ hidden[rows]
        return by_hidden, by_weight, None, None


def veomni(given: Inputs) -> Tensor:
    """The same objective in chunks of 1,024 positions: five matmuls instead of three."""
    each = _Recomputed.apply(*factors(given), given.teacher.ids, given.teacher.log_probs)
    return mean(each, given.mask)
