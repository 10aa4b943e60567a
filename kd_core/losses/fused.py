"""The objective fused with the output head: logits of all positions never exist at once.

Hidden states [N, D], head weight [V, D] and the sparse teacher go in; sums and gradients come out:

    (uncertainty of all positions, where a term selects by it)
    for a chunk of positions:
        logits [n, V] into the one buffer                            head.py
        sparse view, and the softmax over the tail in their place    reduction.py
        the terms on [n, K], and their derivatives by autograd       objective.py, tails.py, divergences.py
        dL/dlogits into the same buffer                              reduction.py
        two matmuls: gradients by hidden states and by weight        head.py

A term at a student temperature other than 1 costs one more buffer and softmax. Sums are float32 over a chunk and
float64 over chunks; with float64 inputs everything is float64.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd_core.losses.head import HeadGradients, LogitHead, Precision, Weights, matmul_in
from kd_core.losses.objective import Objective
from kd_core.losses.observations import observe
from kd_core.losses.reduction import Gradients, Positions, Reduced, reduce_, student_entropy, write_gradient_
from kd_core.losses.selection import teacher_entropy
from kd_core.types import TeacherTopK

F = TypeVar("F", bound=Callable[..., Any])


class LossSums(NamedTuple):
    """`total` (differentiable, already times `scale`), and the detached sums over scored positions, in nats."""

    total: Float[Tensor, ""]
    sums: dict[str, Tensor]


def _rows(data: Positions, rows: slice) -> Positions:
    """A chunk; what is not scored is silenced in the hidden states too."""
    teacher, mask = data.teacher, data.mask[rows]
    hidden = torch.where(mask[:, None], data.hidden[rows], 0.0)
    tempered = tuple((temperature, tail[rows]) for temperature, tail in teacher.tempered_tails)
    entries = TeacherTopK(teacher.ids[rows], teacher.log_probs[rows], teacher.tail_log_prob[rows], tempered)
    return Positions(hidden, entries, data.labels[rows], mask)


@dataclass(frozen=True)
class _Job:
    """One call of the loss: its inputs and its buffers."""

    data: Positions
    head: Weights
    objective: Objective
    scale: float
    buffers: dict[float, Tensor]

    @classmethod
    def make(cls, data: Positions, head: Weights, objective: Objective, scale: float) -> "_Job":
        """Buffers for one chunk, one a temperature of the student."""
        shape = (min(len(data.hidden), objective.chunk_tokens), len(head.weight))
        terms = objective.terms.values()
        temperatures = [1.0, *sorted({term.view_temperature for term in terms} - {1.0})]
        device, dtype = data.hidden.device, head.precision.keep
        buffers = {at: torch.empty(shape, device=device, dtype=dtype) for at in temperatures}
        return cls(data, head, objective, scale, buffers)

    def slices(self) -> Iterator[slice]:
        """Chunk by chunk."""
        size = self.objective.chunk_tokens
        return (slice(start, start + size) for start in range(0, len(self.data.hidden), size))

    def reduce(self, chunk: Positions) -> tuple[dict[float, Reduced], Tensor | None]:
        """Logits into the first buffer, and all buffers reduced; also the slope of a soft cap."""
        n = len(chunk.hidden)
        logits = self.buffers[1.0][:n]
        slope = self.head.logits_(chunk.hidden, logits)
        for temperature, buffer in self.buffers.items():
            if temperature != 1:
                torch.div(logits, temperature, out=buffer[:n])
        means = {term.view_temperature for term in self.objective.terms.values() if term.needs_tail_mean}
        reduced = {at: reduce_(buffer[:n], chunk, at in means) for at, buffer in self.buffers.items()}
        return reduced, slope

    def position_weights(self) -> dict[str, Tensor]:
        """Factors of all positions for each term that selects."""
        keeps = {name: term.positions for name, term in self.objective.terms.items() if term.positions}
        signals = {keep.signal for keep in keeps.values()}
        uncertainty: dict[str, Tensor] = {}
        if "teacher_entropy" in signals:
            uncertainty["teacher_entropy"] = teacher_entropy(self.data.teacher)
        if "student_entropy" in signals:
            entropies = [self.buffers[1.0].new_empty(0)]
            for rows in self.slices():
                chunk = _rows(self.data, rows)
                view = self.reduce(chunk)[0][1.0].view
                entropies.append(student_entropy(self.buffers[1.0][: len(chunk.hidden)], view))
            uncertainty["student_entropy"] = torch.cat(entropies)
        return {name: keep.weights(uncertainty[keep.signal], self.data.mask) for name, keep in keeps.items()}

    def losses(
        self, reduced: dict[float, Reduced], mask: Tensor, factors: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a chunk (differentiable) and its sums."""
        loss, sums, weights = torch.zeros((), device=mask.device), {}, self.objective.weights()
        for name, term in self.objective.terms.items():
            each = term.values(reduced[term.view_temperature].view)
            if name in factors:
                each = each * factors[name]
            value = torch.where(mask, each, 0.0).sum()
            sums[f"{name}_loss"] = value.detach()
            loss = loss + weights[name] * value
        return loss, {"loss": loss.detach(), **sums}

    def write_gradient(self, chunk: Positions, reduced: dict[float, Reduced], loss: Tensor) -> Tensor:
        """dL/dlogits of a chunk, in the first buffer."""
        views = [each.view for each in reduced.values()]
        n = len(chunk.hidden)
        for (temperature, buffer), view, by_view in zip(
            self.buffers.items(), views, Gradients.of(loss, self.scale, views), strict=True
        ):
            write_gradient_(buffer[:n], chunk, view, by_view)
            if temperature != 1:
                self.buffers[1.0][:n].add_(buffer[:n], alpha=1 / temperature)
        return self.buffers[1.0][:n]

    def run(self, gradients: HeadGradients | None) -> dict[str, Tensor]:
        """The sums; fills the gradients where they are wanted."""
        totals = dict.fromkeys(self.objective.sum_names(), torch.zeros((), dtype=torch.float64))
        factors = self.position_weights()
        for rows in self.slices():
            chunk = _rows(self.data, rows)
            reduced, slope = self.reduce(chunk)
            with torch.enable_grad():
                loss, sums = self.losses(reduced, chunk.mask, {name: each[rows] for name, each in factors.items()})
            sums |= observe(reduced[1.0], chunk.mask)
            if "student_entropy" in self.objective.observe:
                entropy = student_entropy(self.buffers[1.0][: len(chunk.hidden)], reduced[1.0].view)
                sums["student_entropy"] = torch.where(chunk.mask, entropy, 0.0).sum()
            totals = {name: total + sums[name].double() for name, total in totals.items()}
            if gradients is None:
                continue
            by_logits = self.write_gradient(chunk, reduced, loss)
            if slope is not None:
                by_logits.mul_(slope)
            gradients.add_(rows, chunk.hidden, by_logits, self.head)
        return totals


def _outside_compiled_graphs(function: F) -> F:
    """A compiled caller's graph breaks here: inside are matmuls and single passes, nothing that a compiler fuses."""

    @functools.wraps(function)
    def called(*args: Any, **settings: Any) -> Any:
        # Asked at the call, because `disable` imports the compiler, which takes a second.
        inner: Any = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return inner(*args, **settings)

    wrapped: Any = called
    return wrapped


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
            gradients = HeadGradients.zeros(hidden, weight, bias, precision.keep)
        with torch.autocast(device.type, enabled=False), matmul_in(precision, device):
            head = Weights.of(weight, bias, call.head, precision)
            data = Positions(hidden, call.teacher, call.labels, call.mask)
            sums |= _Job.make(data, head, call.objective, call.scale).run(gradients)
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


@_outside_compiled_graphs
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
        weight: the output head.
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
