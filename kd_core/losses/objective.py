"""The objective: named, weighted terms over one and the same sparse view of teacher and student.

A new loss is a divergence or a tail in `divergences.py`, or a class with `weight` and `values` like those here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.losses.divergences import DIVERGENCES, TAILS, SparseView


@runtime_checkable
class Term(Protocol):
    """A loss per position, in nats; its sum enters the objective times `weight`."""

    @property
    def weight(self) -> float:
        """Factor in the objective; the logged value is without it."""
        ...

    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """The loss at each position, differentiable in the view's student fields."""
        ...


def _choose(what: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise UsageError(f"loss: {what} {name!r} is unknown; wanted one of {', '.join(sorted(known))}.")


@dataclass(frozen=True)
class Distillation:
    """A divergence between teacher and student under a tail treatment (names as in `divergences.py`)."""

    weight: float = 1.0
    divergence: str = "forward_kl"
    tail: str = "tail_bucket"

    def __post_init__(self) -> None:
        _choose("divergence", self.divergence, DIVERGENCES)
        _choose("tail", self.tail, TAILS)

    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """The divergence at each position, in nats."""
        return DIVERGENCES[self.divergence](TAILS[self.tail](view))


@dataclass(frozen=True)
class CrossEntropy:
    """−log q(label): the SFT loss."""

    weight: float = 1.0

    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """The negative log-likelihood of the label at each position, in nats."""
        return -view.student_label


@dataclass(frozen=True)
class Objective:
    """Σ weight · term. `chunk_tokens` positions at a time hold logits of the full vocabulary."""

    terms: dict[str, Term]
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise UsageError(f"loss.chunk_tokens: got {self.chunk_tokens}; wanted at least 1.")
        if all(term.weight == 0 for term in self.terms.values()):
            raise UsageError("loss.terms: every weight is 0, so nothing would be trained. Give one term a weight.")

    def sum_names(self) -> list[str]:
        """Names of the sums that every pass over a batch returns."""
        observed = ["loss", "teacher_mass", "student_mass", "top1_agreement"]
        return observed + [f"{name}_loss" for name in self.terms]
