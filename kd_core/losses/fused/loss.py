"""The objective fused with the lm_head.

    hidden states [N, D], lm_head weight [V, D], teacher's entries [N, K]  ──►  sums, and gradients by the first two

Two passes over chunks of positions share this signature. One goes over the whole vocabulary (`full_vocab.py`). The
other goes over the teacher's K entries alone (`topk_only.py`), where no term needs more and the device is faster so.
Sums are float32 over a chunk and float64 over chunks. With float64 inputs everything is float64.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd_core.compiling import outside_compiled_graphs
from kd_core.losses.fused.choose_backend import backend_of
from kd_core.losses.fused.chunks import LossCall, Positions
from kd_core.losses.fused.full_vocab import sum_over_vocabulary
from kd_core.losses.fused.lm_head import LmHead, LmHeadGradients, MatmulPrecision
from kd_core.losses.fused.topk_only import sum_over_support
from kd_core.losses.fused.vocab_shard import WHOLE_VOCAB, VocabShard
from kd_core.losses.objective import Objective
from kd_core.row_shares import WHOLE_ROWS, RowShare
from kd_core.types import LmHeadForm, TeacherTopK


class LossSums(NamedTuple):
    """Results of one call.

    `total` is differentiable and already times `scale`. `sums` are detached sums over scored positions, in nats.
    """

    total: Float[Tensor, ""]
    sums: dict[str, Tensor]


class _NonDiffInputs(NamedTuple):
    """Non-differentiable inputs of one call of the loss."""

    teacher: TeacherTopK
    labels: Tensor
    mask: Tensor
    objective: Objective
    scale: float
    form: LmHeadForm
    shard: VocabShard
    row_share: RowShare
    with_grad: bool


class _FusedHead(torch.autograd.Function):
    """The fused loss as an autograd function. `forward` computes the gradients, and `backward` only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: _NonDiffInputs,
        sums: dict[str, Tensor],
    ) -> Tensor:
        precision = MatmulPrecision.from_hidden(hidden)
        device = hidden.device
        # Allocate gradients only for inputs that need them.
        gradients = None
        if inputs.with_grad and any(ctx.needs_input_grad[:3]):
            trained_weight, trained_bias = (parameter if needed else None for parameter, needed in zip(
                (weight, bias), ctx.needs_input_grad[1:3], strict=True
            ))  # fmt: skip
            gradients = LmHeadGradients.allocate(hidden, trained_weight, trained_bias, precision.accum_dtype)
        # The passes choose the dtype of each matmul themselves.
        with torch.autocast(device.type, enabled=False):
            head = LmHead.from_weight(weight, replace(inputs.form, bias=bias), inputs.shard, precision)
            call = LossCall(
                Positions(hidden, inputs.teacher, inputs.labels, inputs.mask),
                inputs.objective,
                inputs.scale,
                inputs.row_share,
            )
            K, V = inputs.teacher.ids.shape[1], head.vocab_size
            takes_support = not inputs.objective.needs_vocabulary and backend_of(weight).support_is_cheaper(K, V)
            sums |= (sum_over_support if takes_support else sum_over_vocabulary)(call, head, gradients)
        ctx.gradients, ctx.dtypes = gradients, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return (sums["loss"] * inputs.scale).to(device=device, dtype=precision.accum_dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the forward pass times the gradient by the loss."""
        gradients: LmHeadGradients = ctx.gradients
        del ctx.gradients
        for gradient in (gradients.hidden, gradients.weight, gradients.bias):
            if gradient is not None:
                backend_of(gradient).scale_(gradient, grad_outputs[0])
        # Each in the dtype of its input. The last two inputs of `forward` have none.
        with_dtypes = zip((gradients.hidden, gradients.weight, gradients.bias), ctx.dtypes, strict=True)
        return *(None if gradient is None else gradient.to(dtype) for gradient, dtype in with_dtypes), None, None


def _zero_masked(teacher: TeacherTopK, mask: Tensor, dtype: torch.dtype) -> TeacherTopK:
    """Sets ids and log-probabilities to 0 at masked positions, whose garbage could make intermediates non-finite."""

    def zero(values: Tensor) -> Tensor:
        kept = torch.where(mask if values.dim() == 1 else mask[:, None], values, 0)
        return kept.to(dtype) if kept.is_floating_point() else kept

    return teacher.map(zero)


@outside_compiled_graphs
def fused_loss(  # noqa: PLR0913 (the head's inputs and form, the three targets, the objective and its scale)
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    teacher: TeacherTopK,
    labels: Int[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    objective: Objective,
    scale: float = 1.0,
    form: LmHeadForm | None = None,
    shard: VocabShard = WHOLE_VOCAB,
    row_share: RowShare = WHOLE_ROWS,
) -> LossSums:
    """Computes loss and metrics of `objective` over the logits of an lm_head, and in the backward pass all gradients.

    Args:
        hidden: last hidden states.
        weight: the lm_head, or the rows of it in `shard`.
        teacher: the teacher's entries at the same positions.
        labels: the next token of each position. Ignored where `mask` is false.
        mask: positions that are scored. All others give exactly 0, whatever they hold.
        objective: weighted terms.
        scale: factor on `total`, usually one over the scored tokens of the optimiser step.
        form: what the student does to `hidden @ weight.T`. None does nothing.
        shard: the slice of the vocabulary that `weight` and `form.bias` hold, where tensor parallelism divides them.
        row_share: which positions of their rows these are, where context parallelism divides rows.
    """
    form = form or LmHeadForm()
    targets = _zero_masked(teacher, mask, MatmulPrecision.from_hidden(hidden).accum_dtype)
    inputs = _NonDiffInputs(
        targets,
        torch.where(mask, labels, 0),
        mask,
        objective,
        scale,
        form,
        shard,
        row_share,
        torch.is_grad_enabled(),
    )
    # `forward` fills the detached sums.
    sums: dict[str, Tensor] = {}
    total = _FusedHead.apply(hidden, weight, form.bias, inputs, sums)
    assert isinstance(total, Tensor)
    return LossSums(total, sums)
