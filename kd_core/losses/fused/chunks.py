"""One call of the loss: its positions in chunks, and the objective over the views of a chunk."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd_core.losses.objective import Objective
from kd_core.losses.sparse_view import SparseView
from kd_core.losses.token_selection import KeepUncertain, teacher_entropy
from kd_core.row_shares import RowShare
from kd_core.sharded_values import gather_positions
from kd_core.types import TeacherTopK


class Positions(NamedTuple):
    """Inputs of the loss at n positions: the student's hidden states and their targets."""

    hidden: Float[Tensor, "n D"]
    teacher: TeacherTopK
    labels: Int[Tensor, " n"]
    mask: Bool[Tensor, " n"]


def _weights_in_rows(
    selection: KeepUncertain, uncertainty: Float[Tensor, " N"], mask: Bool[Tensor, " N"], share: RowShare
) -> Float[Tensor, " N"]:
    """Returns the factors of `selection` among the positions of whole rows, which ranks may share."""
    if share.size == 1:
        return selection.weights(uncertainty, mask)
    # Gather one number of each position, and mark with −∞ those that are not scored.  [N] → [B, T · size]
    own = torch.where(mask, uncertainty, -torch.inf).unflatten(0, (share.rows, -1))
    whole = gather_positions(own, share)
    factors = selection.weights(whole.flatten(), whole.flatten() != -torch.inf)
    return share.cut(factors.view_as(whole)).flatten()


class LossCall(NamedTuple):
    """Positions of one call of the loss, and its objective. `scale` is a factor on the gradients alone.

    `row_share` says which positions of their rows these are.
    """

    positions: Positions
    objective: Objective
    scale: float
    row_share: RowShare

    def chunk_slices(self, size: int) -> Iterator[slice]:
        """Yields slices of at most `size` positions that cover all positions."""
        return (slice(start, start + size) for start in range(0, len(self.positions.hidden), size))

    def chunk(self, rows: slice) -> Positions:
        """Returns the positions of one chunk, with hidden states of 0 where a position is not scored."""
        teacher, mask = self.positions.teacher, self.positions.mask[rows]
        # Hidden states that are not scored may be NaN, and 0 · NaN would enter the weight's gradient.  [n, D]
        hidden = torch.where(mask[:, None], self.positions.hidden[rows], 0.0)
        entries = teacher.map(lambda values: values[rows])
        return Positions(hidden, entries, self.positions.labels[rows], mask)

    def position_weights(self, student_entropy: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Computes the factors [N] of all positions for each term that selects among them.

        `student_entropy` returns the student's entropy [N]. It is called only if a term selects by it.
        """
        selections = {name: term.positions for name, term in self.objective.terms.items() if term.positions}
        signals = {selection.signal for selection in selections.values()}
        # Compute each signal once, however many terms use it.  [N]
        uncertainty: dict[str, Tensor] = {}
        if "teacher_entropy" in signals:
            uncertainty["teacher_entropy"] = teacher_entropy(self.positions.teacher)
        if "student_entropy" in signals:
            uncertainty["student_entropy"] = student_entropy()
        mask, share = self.positions.mask, self.row_share
        return {
            name: _weights_in_rows(selection, uncertainty[selection.signal], mask, share)
            for name, selection in selections.items()
        }

    def weighted_loss(
        self, views: Mapping[float, SparseView], mask: Tensor, factors: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the weighted loss of a chunk, differentiable in its views, and the sums to log.

        Args:
            views: the view of the chunk for each temperature of the student.
            mask: the scored positions [n].
            factors: the chunk's slices [n] of `position_weights`.
        """
        with torch.enable_grad():
            loss, sums, weights = torch.zeros((), device=mask.device), {}, self.objective.weights()
            for name, term in self.objective.terms.items():
                # Loss per position, 0 where it is not scored, then its sum over the chunk.  [n] → scalar
                position_losses = term.values(views[term.view_temperature])
                if name in factors:
                    position_losses = position_losses * factors[name]
                value = torch.where(mask, position_losses, 0.0).sum()
                sums[f"{name}_loss"] = value.detach()
                loss = loss + weights[name] * value
        return loss, {"loss": loss.detach(), **sums}

    def add_sums(self, chunks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Adds up the sums of the objective over chunks, in float64."""
        names = self.objective.sum_names()
        totals = torch.zeros(len(names), dtype=torch.float64, device=self.positions.hidden.device)
        for sums in chunks:
            # All sums at once: each operation is a launch on a GPU.  [names]
            totals += torch.stack([sums[name] for name in names])
        return dict(zip(names, totals.unbind(), strict=True))
