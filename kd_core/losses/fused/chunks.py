"""One call of the loss: its positions in chunks, and the objective over a chunk's views."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd_core.losses.objective import Objective
from kd_core.losses.sparse_view import SparseView
from kd_core.losses.token_selection import teacher_entropy
from kd_core.types import TeacherTopK


class Positions(NamedTuple):
    """A chunk of n positions: the student's hidden states and its targets."""

    hidden: Float[Tensor, "n D"]
    teacher: TeacherTopK
    labels: Int[Tensor, " n"]
    mask: Bool[Tensor, " n"]


class Job(NamedTuple):
    """All positions of a call, and what is to be summed over them; `scale` is on the gradient alone."""

    data: Positions
    objective: Objective
    scale: float

    def slices(self, size: int) -> Iterator[slice]:
        """Chunk by chunk."""
        return (slice(start, start + size) for start in range(0, len(self.data.hidden), size))

    def chunk(self, rows: slice) -> Positions:
        """Some positions; what is not scored is silenced in the hidden states too."""
        teacher, mask = self.data.teacher, self.data.mask[rows]
        hidden = torch.where(mask[:, None], self.data.hidden[rows], 0.0)
        tempered = tuple((temperature, tail[rows]) for temperature, tail in teacher.tempered_tails)
        entries = TeacherTopK(teacher.ids[rows], teacher.log_probs[rows], teacher.tail_log_prob[rows], tempered)
        return Positions(hidden, entries, self.data.labels[rows], mask)

    def position_weights(self, student_entropy: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Factors of all positions for each term that selects; the student's entropy is computed where one asks."""
        keeps = {name: term.positions for name, term in self.objective.terms.items() if term.positions}
        signals = {keep.signal for keep in keeps.values()}
        uncertainty: dict[str, Tensor] = {}
        if "teacher_entropy" in signals:
            uncertainty["teacher_entropy"] = teacher_entropy(self.data.teacher)
        if "student_entropy" in signals:
            uncertainty["student_entropy"] = student_entropy()
        return {name: keep.weights(uncertainty[keep.signal], self.data.mask) for name, keep in keeps.items()}

    def losses(
        self, views: Mapping[float, SparseView], mask: Tensor, factors: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a chunk (differentiable) and its sums; a view for each temperature of the student."""
        with torch.enable_grad():
            loss, sums, weights = torch.zeros((), device=mask.device), {}, self.objective.weights()
            for name, term in self.objective.terms.items():
                each = term.values(views[term.view_temperature])
                if name in factors:
                    each = each * factors[name]
                value = torch.where(mask, each, 0.0).sum()
                sums[f"{name}_loss"] = value.detach()
                loss = loss + weights[name] * value
        return loss, {"loss": loss.detach(), **sums}

    def no_sums(self) -> dict[str, Tensor]:
        """Zeros under the names of all sums, in float64."""
        return dict.fromkeys(self.objective.sum_names(), torch.zeros((), dtype=torch.float64))
