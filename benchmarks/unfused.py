"""Our default objective without fusion, as cheap as logits of all positions allow. No project has it: it is a floor.

One matmul, one softmax in float32 (in place of the logits where they are float32), and the gradient in its place.
What the fused loss gains over this is memory, and what fewer passes over memory gain in time.
"""

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, mean, wide

LEAST = 1e-10


class _TailBucket(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor) -> Tensor:
        softmax = wide(logits.detach())
        torch.softmax(softmax, dim=1, out=softmax)
        entries = softmax.gather(1, ids)
        rest = (1 - entries.sum(dim=1)).clamp(min=LEAST)
        p, r = log_probs.exp(), tail.exp()
        ctx.save_for_backward(softmax, ids, entries, rest, p, r)
        ctx.dtype = logits.dtype
        return (p * (log_probs - entries.log())).sum(dim=1) + r * (tail - rest.log())

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        softmax, ids, entries, rest, p, r = ctx.saved_tensors
        # Outside the entries q (1 − r / s), for the tail's share is spread as q is there; on them q − p.
        total = p.sum(dim=1) + r
        softmax.mul_(((total - r / rest) * grads[0])[:, None])
        softmax.scatter_(1, ids, (entries * total[:, None] - p) * grads[0][:, None])
        return softmax.to(ctx.dtype), None, None, None


def tail_bucket(given: Inputs) -> Tensor:
    """Forward KL on the entries and the tail."""
    teacher = given.teacher
    logits = given.hidden @ given.weight.T
    return mean(_TailBucket.apply(logits, teacher.ids, teacher.log_probs, teacher.tail_log_prob), given.mask)
