"""The objective fused with the output head: logits of all positions never exist at once.

Hidden states [N, D], head weight [V, D] and the sparse teacher go in; sums and gradients come out. A chunk of
positions at a time: one matmul to float32 logits, the K support logits gathered and masked out, one softmax in
place over what is left (the tail), and the gradient written into the same buffer. With q the student's
probabilities, g the derivatives of the loss by the student's log-probabilities on the support S, by its tail
and by the label's, and G their sum,

    dL/dz_j = g_tail · q_j / q(tail) − G · q_j          for j outside S,
    dL/dz_j = g_j − G · q_j                             for j in S,   and + g_label at the label,

so every divergence and tail costs one softmax over the tail, and what is its own is on [n, K] tensors, where
autograd differentiates it. Sums are float32 over a chunk and float64 over chunks.
"""

import contextlib
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd_core.losses.divergences import SparseView
from kd_core.losses.objective import Objective
from kd_core.types import TeacherTopK


class LossSums(NamedTuple):
    """`total` (differentiable, already times `scale`), and the detached sums over scored positions, in nats."""

    total: Float[Tensor, ""]
    sums: dict[str, Tensor]


class _Chunk(NamedTuple):
    hidden: Tensor
    teacher: TeacherTopK
    labels: Tensor
    mask: Tensor


@contextlib.contextmanager
def _matmul_in(dtype: torch.dtype, device: torch.device) -> Generator[None]:
    """On a CPU, let float32 matmuls multiply in bfloat16 and add up in float32: bf16 speed, float32 logits."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b, multiplied in `dtype`, returned in float32."""
    if a.device.type == "cpu" or dtype == torch.float32:
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32, out=out)


def _observed(view: SparseView, objective: Objective, mask: Tensor, top1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of a chunk (differentiable) and its sums."""
    zero = torch.zeros((), device=mask.device)
    loss, sums = zero, {}
    for name, term in objective.terms.items():
        value = torch.where(mask, term.values(view), 0.0).sum()
        sums[f"{name}_loss"] = value.detach()
        loss = loss + term.weight * value
    sums["loss"] = loss.detach()
    for name, log_probs in (
        ("teacher_mass", view.teacher_log_probs),
        ("student_mass", view.student_log_probs.detach()),
    ):
        sums[name] = torch.where(mask[:, None] & view.used(), log_probs.exp(), 0.0).sum()
    sums["top1_agreement"] = (top1 & mask).sum()
    return loss, sums


def _write_gradient(buffer: Tensor, chunk: _Chunk, view: SparseView, grads: tuple[Tensor, Tensor, Tensor]) -> None:
    """Turn the tail's softmax in `buffer` [n, V] into dL/dz. Sparse entries are added last, in float32."""
    g_support, g_tail, g_label = grads
    total = g_support.sum(dim=1) + g_tail + g_label
    buffer.mul_((g_tail - total * view.student_tail.detach().exp())[:, None])
    entries = torch.where(view.used(), g_support - total[:, None] * view.student_log_probs.detach().exp(), 0.0)
    buffer.scatter_add_(1, chunk.teacher.ids, entries)
    buffer.scatter_add_(1, chunk.labels[:, None], g_label[:, None])
    buffer.masked_fill_(~chunk.mask[:, None], 0.0)


def _student_view(buffer: Tensor, chunk: _Chunk) -> tuple[SparseView, Tensor]:
    """Reduce logits in `buffer` to the sparse view, leaving there the softmax over the tail; also top-1 agreement."""
    ids, used = chunk.teacher.ids, chunk.teacher.log_probs > -torch.inf
    support = buffer.gather(1, ids)
    label = buffer.gather(1, chunk.labels[:, None]).squeeze(1)
    if not used.all():
        support = support.masked_fill(~used, -torch.inf)
    masked_ids = torch.where(used, ids, ids[:, :1])
    buffer.scatter_(1, masked_ids, -torch.inf)
    largest = buffer.amax(dim=1)
    tail = largest - torch.softmax(buffer, dim=1, out=buffer).amax(dim=1).log()
    normaliser = torch.logaddexp(support.logsumexp(dim=1), tail)
    view = SparseView(
        chunk.teacher.log_probs,
        chunk.teacher.tail_log_prob,
        (support - normaliser[:, None]).requires_grad_(),
        (tail - normaliser).requires_grad_(),
        (label - normaliser).requires_grad_(),
    )
    favourite = chunk.teacher.log_probs.argmax(dim=1, keepdim=True)
    best = support.gather(1, favourite).squeeze(1)
    return view, (best >= support.amax(dim=1)) & (best > largest)


class _FusedHead(torch.autograd.Function):
    """Computes the gradient in the forward pass; the backward pass only scales it."""

    @staticmethod
    def forward(  # noqa: PLR0913 (autograd.Function takes its inputs flat)
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        data: _Chunk,
        objective: Objective,
        scale: float,
        sums: dict[str, Tensor],
    ) -> Tensor:
        with_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        N, V = len(hidden), len(weight)
        whole = torch.empty(min(N, objective.chunk_tokens), V, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_grad else None
        with torch.autocast(hidden.device.type, enabled=False), _matmul_in(dtype, hidden.device):
            for start in range(0, N, objective.chunk_tokens):
                rows = slice(start, start + objective.chunk_tokens)
                teacher = TeacherTopK(*(field[rows] for field in data.teacher))
                scored = torch.where(data.mask[rows, None], hidden[rows], 0.0)
                chunk = _Chunk(scored, teacher, data.labels[rows], data.mask[rows])
                buffer = whole[: len(chunk.hidden)]
                _matmul(chunk.hidden, weight.t(), dtype, out=buffer)
                view, top1 = _student_view(buffer, chunk)
                with torch.enable_grad():
                    loss, chunk_sums = _observed(view, objective, chunk.mask, top1)
                for name, value in chunk_sums.items():
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double()
                if grad_hidden is None or grad_weight is None:
                    continue
                grads = _small_gradients(loss, scale, view)
                _write_gradient(buffer, chunk, view, grads)
                grad_hidden[rows] = _matmul(buffer, weight, dtype)
                if dtype == torch.float32 or hidden.device.type == "cpu":
                    grad_weight.addmm_(buffer.t(), chunk.hidden.float())
                else:
                    grad_weight += _matmul(buffer.t(), chunk.hidden, dtype)
        if with_grad:
            ctx.gradients = (grad_hidden, grad_weight, hidden.dtype, weight.dtype)
        return (sums["loss"] * scale).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Both gradients, times the loss's own."""
        grad_hidden, grad_weight, hidden_dtype, weight_dtype = ctx.gradients
        del ctx.gradients
        factor = grad_outputs[0]
        if factor != 1:
            grad_hidden.mul_(factor)
            grad_weight.mul_(factor)
        return grad_hidden.to(hidden_dtype), grad_weight.to(weight_dtype), None, None, None, None


def _small_gradients(loss: Tensor, scale: float, view: SparseView) -> tuple[Tensor, Tensor, Tensor]:
    """d(scale · loss) by the student's log-probabilities on the support, of its tail and of the label."""
    wanted = (view.student_log_probs, view.student_tail, view.student_label)
    start = torch.full_like(loss, scale)
    found = torch.autograd.grad(loss, wanted, start, allow_unused=True, materialize_grads=True)
    return found[0], found[1], found[2]


def fused_loss(  # noqa: PLR0913 (the head's two inputs, the three targets, the objective and its scale)
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    teacher: TeacherTopK,
    labels: Int[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    objective: Objective,
    scale: float = 1.0,
) -> LossSums:
    """Loss, metrics and (in the backward pass) both gradients of `objective` over `hidden @ weight.T`.

    Args:
        hidden: last hidden states.
        weight: the output head.
        teacher: its entries at the same positions.
        labels: the next token of each position; ignored where `mask` is false.
        mask: positions that are scored. All others give exactly 0, whatever they hold.
        objective: weighted terms.
        scale: `total` is times this (one over the scored tokens of the optimiser step).
    """
    # What is masked may be garbage: ids of 0, no entries and a label of 0 keep every intermediate finite.
    teacher = TeacherTopK(
        torch.where(mask[:, None], teacher.ids, 0),
        torch.where(mask[:, None], teacher.log_probs, 0.0),
        torch.where(mask, teacher.tail_log_prob, 0.0),
    )
    data = _Chunk(hidden, teacher, torch.where(mask, labels, 0), mask)
    sums: dict[str, Tensor] = {}
    total = _FusedHead.apply(hidden, weight, data, objective, scale, sums)
    assert isinstance(total, Tensor)
    return LossSums(total, sums)
