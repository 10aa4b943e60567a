"""NVIDIA's two: both sides renormalised on the teacher's entries.

NeMo-Aligner (Apache-2.0): nemo_aligner/models/nlp/gpt/megatron_gpt_knowledge_distillation.py and
`_TopKLogitsCrossEntropy` in nemo_aligner/utils/distributed.py, at 084ef360 and 06534464. Its `bwd_kl` is forward KL.
NeMo-RL (Apache-2.0): `DistillationLossFn` in nemo_rl/algorithms/loss_functions.py and the top-k functions
of nemo_rl/distributed/model_utils.py, versions of 2025.
"""

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, mean, wide

CHUNK = 1024


def _forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum(dim=1)


def aligner(given: Inputs) -> Tensor:
    """KL(p / M ‖ q / A) on the K entries. The value needs no softmax over V; the gradient is a full [N, V]."""
    logits = given.hidden @ given.weight.T
    student = wide(logits.gather(1, given.teacher.ids)).log_softmax(dim=1)
    return mean(_forward_kl(given.teacher.log_probs.log_softmax(dim=1), student), given.mask)


def aligner_with_rest(given: Inputs) -> Tensor:
    """The K + 1 variant that stands in the source switched off: the rest is Z minus the entries, at least 1e-10."""
    logits = given.hidden @ given.weight.T
    shifted = wide(logits - logits.detach().amax(dim=1, keepdim=True))
    entries = shifted.gather(1, given.teacher.ids)
    rest = (shifted.logsumexp(dim=1).exp() - entries.exp().sum(dim=1)).clamp(min=1e-10)
    student = torch.cat([entries, rest.log()[:, None]], dim=1).log_softmax(dim=1)
    own_rest = (1 - given.teacher.log_probs.exp().sum(dim=1)).clamp(min=1e-10)
    teacher = torch.cat([given.teacher.log_probs, own_rest.log()[:, None]], dim=1).log_softmax(dim=1)
    return mean(_forward_kl(teacher, student), given.mask)


def rl(given: Inputs) -> Tensor:
    """`zero_outside_topk: false`: the same from logits of all positions in float32."""
    student = wide(given.hidden @ given.weight.T).gather(1, given.teacher.ids).log_softmax(dim=1)
    return mean(_forward_kl(given.teacher.log_probs.log_softmax(dim=1), student), given.mask)


class _GatheredLogSoftmax(torch.autograd.Function):
    """log q at the entries, chunk by chunk over given logits; the backward pass makes the softmax again."""

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, ids)
        parts = zip(logits.split(CHUNK), ids.split(CHUNK), strict=True)
        return torch.cat([wide(rows).log_softmax(dim=1).gather(1, at) for rows, at in parts])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        logits, ids = ctx.saved_tensors
        parts = []
        for rows, at, g in zip(logits.split(CHUNK), ids.split(CHUNK), grads[0].split(CHUNK), strict=True):
            slope = wide(rows).softmax(dim=1).mul_(-g.sum(dim=1, keepdim=True))
            parts.append(slope.scatter_add_(1, at, g).to(logits.dtype))
        return torch.cat(parts), None


def rl_zero_outside(given: Inputs) -> Tensor:
    """`zero_outside_topk: true`: the teacher renormalised, the student over all of V."""
    student = _GatheredLogSoftmax.apply(given.hidden @ given.weight.T, given.teacher.ids)
    return mean(_forward_kl(given.teacher.log_probs.log_softmax(dim=1), student), given.mask)
