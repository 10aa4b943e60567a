"""Axolotl (Apache-2.0): src/axolotl/integrations/kd/, topk_logprob/forward_kl.py and kernels/liger.py.

At 107c67ae and 00bfeb42. The second is built on Liger-Kernel's base class for chunked losses; what that does
(gradient of each chunk by `torch.func`, a new gradient of the weight a chunk, added up) is typed here too.
"""

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, factors, mean, wide

CHUNK = 1024


def forward_kl(given: Inputs) -> Tensor:
    """Renormalised entries against the student's full softmax; all logits cast to float32."""
    logits = wide(given.hidden @ given.weight.T)
    student = logits.gather(1, given.teacher.ids) - logits.logsumexp(dim=1, keepdim=True)
    teacher = given.teacher.log_probs.log_softmax(dim=1)
    return mean((teacher.exp() * (teacher - student)).sum(dim=1), given.mask)


def _chunk_loss(hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    logits = wide(hidden @ weight.T)
    student = logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)
    student = student - student.logsumexp(dim=1, keepdim=True)
    return torch.where(mask, (teacher.exp() * (teacher - student)).sum(dim=1), 0.0).sum()


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        total, by_weight, by_hidden = hidden.new_zeros((), dtype=torch.float32), torch.zeros_like(weight), []
        differentiate = torch.func.grad_and_value(_chunk_loss, argnums=(0, 1))
        chunks = max(1, len(hidden) // CHUNK)
        for part in zip(*(x.chunk(chunks) for x in (hidden, ids, teacher, mask)), strict=True):
            (of_hidden, of_weight), value = differentiate(part[0], weight, *part[1:])
            by_hidden.append(of_hidden)
            by_weight.add_(of_weight)
            total = total + value
        ctx.save_for_backward(torch.cat(by_hidden), by_weight)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden * grads[0], by_weight * grads[0], None, None, None


def chunked(given: Inputs) -> Tensor:
    """`normalize_topk: true`, its default: both sides renormalised."""
    teacher = given.teacher.log_probs.log_softmax(dim=1)
    total = _GradientInForward.apply(*factors(given), given.teacher.ids, teacher, given.mask)
    return total / given.mask.sum().clamp(min=1)
