"""The objective fused with the output head: hidden states [N, D], head weight [V, D] and the sparse teacher go in,
sums and gradients come out.

Two passes over chunks of positions share this signature: over the whole vocabulary (`vocabulary.py`), and, where no
term of the objective needs it, over the teacher's K entries alone (`support.py`). Sums are float32 over a chunk and
float64 over chunks; with float64 inputs everything is float64.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd_core.compiling import outside_compiled_graphs
from kd_core.losses.fused.chunks import Job, Positions
from kd_core.losses.fused.full_vocab import sums_over_vocabulary
from kd_core.losses.fused.lm_head import Head, HeadGradients, LogitHead, Precision, matmul_in
from kd_core.losses.fused.topk_only import sums_over_support
from kd_core.losses.objective import Objective
from kd_core.types import TeacherTopK


class LossSums(NamedTuple):
    """`total` (differentiable, already times `scale`), and the detached sums over scored positions, in nats."""

    total: Float[Tensor, ""]
    sums: dict[str, Tensor]


class _Call(NamedTuple):
    """What of a call is not differentiated."""

    teacher: TeacherTopK
    labels: Tensor
    mask: Tensor
    objective: Objective
    scale: float
    head: LogitHead
    with_grad: bool


class _FusedHead(torch.autograd.Function):
    """Computes the gradient in the forward pass; the backward pass only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: _Call,
        sums: dict[str, Tensor],
    ) -> Tensor:
        precision = Precision.of(hidden)
        device = hidden.device
        gradients = None
        if call.with_grad and any(ctx.needs_input_grad[:3]):
            of_weight, of_bias = (part if needed else None for part, needed in zip(
                (weight, bias), ctx.needs_input_grad[1:3], strict=True
            ))  # fmt: skip
            gradients = HeadGradients.zeros(hidden, of_weight, of_bias, precision.keep)
        with torch.autocast(device.type, enabled=False):
            head = Head.of(weight, bias, call.head, precision)
            job = Job(Positions(hidden, call.teacher, call.labels, call.mask), call.objective, call.scale)
            if call.objective.needs_vocabulary:
                with matmul_in(precision, device):
                    sums |= sums_over_vocabulary(job, head, gradients)
            else:  # its products of float32 rows stay float32, also on a CPU that has bfloat16 units for them
                sums |= sums_over_support(job, head, gradients)
        ctx.gradients, ctx.dtypes = gradients, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return (sums["loss"] * call.scale).to(device=device, dtype=precision.keep)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """All gradients, times the loss's own."""
        found: HeadGradients = ctx.gradients
        del ctx.gradients
        factor = grad_outputs[0]
        if factor != 1:
            for gradient in (found.hidden, found.weight, found.bias):
                if gradient is not None:
                    gradient.mul_(factor)
        parts = zip((found.hidden, found.weight, found.bias), ctx.dtypes, strict=True)
        return *(None if part is None else part.to(dtype) for part, dtype in parts), None, None


def _silenced(teacher: TeacherTopK, mask: Tensor, dtype: torch.dtype) -> TeacherTopK:
    """What is masked may be garbage: ids of 0 and log-probabilities of 0 keep every intermediate finite."""

    def silence(values: Tensor) -> Tensor:
        return torch.where(mask if values.dim() == 1 else mask[:, None], values, 0)

    return TeacherTopK(
        silence(teacher.ids),
        silence(teacher.log_probs).to(dtype),
        silence(teacher.tail_log_prob).to(dtype),
        tuple((temperature, silence(tail).to(dtype)) for temperature, tail in teacher.tempered_tails),
    )


@outside_compiled_graphs
def fused_loss(  # noqa: PLR0913 (the head's two inputs, the three targets, the objective, its scale, the head's form)
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    teacher: TeacherTopK,
    labels: Int[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    objective: Objective,
    scale: float = 1.0,
    head: LogitHead | None = None,
) -> LossSums:
    """Loss, metrics and (in the backward pass) all gradients of `objective` over the logits of a head.

    Args:
        hidden: last hidden states.
        weight: the output head, or the rows of it that `head.part` says.
        teacher: its entries at the same positions.
        labels: the next token of each position; ignored where `mask` is false.
        mask: positions that are scored. All others give exactly 0, whatever they hold.
        objective: weighted terms.
        scale: `total` is times this (one over the scored tokens of the optimiser step).
        head: what the student does to `hidden @ weight.T`; nothing by default.
    """
    head = head or LogitHead()
    targets = _silenced(teacher, mask, Precision.of(hidden).keep)
    call = _Call(targets, torch.where(mask, labels, 0), mask, objective, scale, head, torch.is_grad_enabled())
    sums: dict[str, Tensor] = {}
    total = _FusedHead.apply(hidden, weight, head.bias, call, sums)
    assert isinstance(total, Tensor)
    return LossSums(total, sums)
