"""Liger-Kernel (BSD-2-Clause) and TRL (Apache-2.0) as the registry has them, where they can be imported.

Tried with Liger-Kernel 0.8.5, whose `chunked_loss` needs no triton, and TRL 1.16.0, which wants its dependencies
(datasets, accelerate, transformers). Both compute dense divergences from the teacher's hidden states and head. A
cache of top-k entries has neither, so what stands in for them is as large as the student's: the same hidden states
in another order, and the same weight. That is a fourth matmul which a sparse teacher does not need, and another
objective. TRL's chunked tail bucket takes sparse teachers and needs no such stand-in.
"""

import importlib
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.inputs import Inputs, Step, factors


def stand_in_teacher(given: Inputs) -> tuple[Tensor, Tensor]:
    """Hidden states and head of a teacher as large as the student."""
    hidden, weight = factors(given)
    return hidden.detach().roll(1, dims=0), weight.detach()


def liger(name: str, **settings: Any) -> Step:
    """One of Liger's chunked losses, without its cross-entropy and without torch.compile."""
    module = importlib.import_module("liger_kernel.chunked_loss")
    loss = getattr(module, name)(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, **settings)
    return lambda given: loss(*factors(given), *stand_in_teacher(given), given.labels.where(given.mask, -100))


def _trl(module: str) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports warns of its own affairs
        return importlib.import_module(f"trl.{module}")


def trl_dense(beta: float) -> Step:
    """`ChunkedDivergenceFunction` on tiles of 4,096 positions by 32,768 tokens, all logits again in the backward."""
    function = _trl("kernels.chunked_divergence").ChunkedDivergenceFunction

    def step(given: Inputs) -> Tensor:
        own, other = factors(given), stand_in_teacher(given)
        each, _ = function.apply(*own, None, *other, None, beta)
        return each.masked_fill(~given.mask, 0).sum() / given.mask.sum().clamp(min=1)

    return step


def trl_tail() -> Step:
    """`_chunked_jsd_loss` at beta 0 with the tail bucket, and the metrics that it always computes."""
    module = _trl("experimental.async_distillation.async_distillation_trainer")
    chunk = module._CHUNKED_LM_HEAD_CHUNK_SIZE

    def step(given: Inputs) -> Tensor:
        ids, log_probs, _, _ = given.teacher
        used = (log_probs > -math.inf) & given.mask[:, None]
        head = (given.weight, None, 1.0, None)
        total, *_ = module._chunked_jsd_loss(given.hidden, *head, ids, log_probs, used, 0.0, 1.0, True, None, 0, chunk)
        return total / given.mask.sum().clamp(min=1)

    return step


INSTALLED: dict[str, tuple[str, Callable[[], Step]]] = {
    "Liger forward KL": ("dense teacher", lambda: liger("LigerFusedLinearJSDLoss", beta=0.0)),
    "Liger JSD": ("dense teacher", lambda: liger("LigerFusedLinearJSDLoss", beta=0.5)),
    "Liger cosine": ("dense teacher", lambda: liger("LigerFusedLinearCosineSimilarityLoss")),
    "TRL forward KL": ("dense teacher", lambda: trl_dense(0.0)),
    "TRL JSD": ("dense teacher", lambda: trl_dense(0.5)),
    "TRL async, itself": ("tail_bucket", trl_tail),
}
"""By name: the objective, and what imports and makes the step."""
