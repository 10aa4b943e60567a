"""Megatron-LM (NVIDIA, BSD-3-Clause): megatron/training/distillation/cached_logits_loss.py, `topk_kl_div`, at c99881af.

The loss of its offline distillation, which always adds the ghost token: one more event with what is missing to 1.
"""

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, mean, wide

LEAST = 1e-8


def _with_ghost(log_probs: Tensor) -> Tensor:
    """One more column: log(1 − Σ p), at least log 1e-8."""
    ghost = (1 - log_probs.exp().sum(dim=1, keepdim=True)).clamp(min=LEAST).log()
    return torch.cat([log_probs, ghost], dim=1)


def ghost_token(given: Inputs) -> Tensor:
    """Forward KL on K + 1 events; all logits in float32, and log-probabilities of all of V before the gather."""
    logits = wide(given.hidden @ given.weight.T)
    logits = logits.sub_(logits.detach().amax(dim=1, keepdim=True))
    log_probs = logits - logits.exp().sum(dim=1, keepdim=True).log()
    student = _with_ghost(log_probs.gather(1, given.teacher.ids))
    teacher = _with_ghost(given.teacher.log_probs)
    return mean((teacher.exp() * (teacher - student)).sum(dim=1), given.mask)
