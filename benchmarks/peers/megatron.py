"""Megatron-LM's way (BSD-3-Clause): K entries and one more event, the ghost token, for all other mass.

Typed from the objective alone, in the manner of its vocabulary-parallel cross-entropy on one rank: logits of all
positions, one softmax in their place, kept for the backward pass, which turns it into the gradient. That is the
least that an unfused loss can do. The file was not at hand, so no version can be named.
"""

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, mean, wide

LEAST = 1e-10


class _GhostToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
        softmax = wide(logits.detach())
        torch.softmax(softmax, dim=1, out=softmax)
        entries = softmax.gather(1, ids)
        ghost = (1 - entries.sum(dim=1)).clamp(min=LEAST)
        p, r = log_probs.exp(), tail.exp()
        ctx.save_for_backward(softmax, ids, entries, ghost, p, r)
        ctx.dtype = logits.dtype
        return (p * (log_probs - entries.log())).sum(dim=1) + r * (tail - ghost.log())

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        softmax, ids, entries, ghost, p, r = ctx.saved_tensors
        # Outside the entries q (1 − r / s), because the ghost's share is spread as q is there; on them q − p.
        outside = (p.sum(dim=1) + r - r / ghost) * grads[0]
        softmax.mul_(outside[:, None])
        softmax.scatter_(1, ids, (entries * (p.sum(dim=1) + r)[:, None] - p) * grads[0][:, None])
        return softmax.to(ctx.dtype), None, None, None


def ghost_token(given: Inputs) -> Tensor:
    """Forward KL on K + 1 events."""
    teacher = given.teacher
    logits = given.hidden @ given.weight.T
    return mean(_GhostToken.apply(logits, teacher.ids, teacher.log_probs, teacher.tail_log_prob), given.mask)
