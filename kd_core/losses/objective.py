"""The objective: named, weighted terms over one and the same sparse view of teacher and student.

A new loss is a divergence in `divergences.py`, a tail in `tails.py`, or a `Term` like those here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.losses.calibration import AT_TEMPERATURES, GAPS
from kd_core.losses.compatibility import check_combination, check_parameters, check_temperature, choose
from kd_core.losses.divergences import DIVERGENCES, Parameters
from kd_core.losses.sparse_view import SparseView
from kd_core.losses.tails import TAILS, Temperatures
from kd_core.losses.term_weights import Weight, at_step, largest, value_of
from kd_core.losses.token_selection import KeepUncertain
from kd_core.ranges import AT_LEAST_1, NOT_NEGATIVE, SHARE_BELOW_1, TEMPERATURE, check_ranges

# What costs more than a step pays, and the sums that it gives.
OBSERVED: Mapping[str, tuple[str, ...]] = {
    "student_entropy": ("student_entropy",),
    "top5_agreement": ("top5_agreement",),
    "calibration": GAPS,
    "temperature": AT_TEMPERATURES,
}
# What `observations.py` sums at every step; of the student only in a pass over the vocabulary.
OF_TEACHER = ("teacher_mass", "teacher_entropy", "label_in_support")
OF_STUDENT = ("student_mass", "top1_agreement", "topk_agreement", "acceptance")


class CacheFacts(NamedTuple):
    """What a loss must know of a cache to say whether it can be trained on it."""

    vocab_size: int
    top_k: int
    tail_temperatures: tuple[float, ...] = (1.0,)
    sampled: bool = False
    tail_known: bool = True


@dataclass(frozen=True)
class Term(ABC):
    """A loss per position, in nats; its sum enters the objective times `weight`, and is logged without it."""

    weight: Weight = 1.0

    @property
    def view_temperature(self) -> float:
        """The temperature of the view that `values` wants. One other than 1 costs a softmax and a buffer."""
        return 1.0

    @property
    def needs_tail_mean(self) -> bool:
        """Whether `values` reads `student_tail_mean`, which costs a pass over the vocabulary."""
        return False

    @property
    def needs_vocabulary(self) -> bool:
        """Whether `values` reads more of the student than its logits on the support, up to a number a position."""
        return True

    @property
    def positions(self) -> KeepUncertain | None:
        """Which scored positions count; None is all."""
        return None

    @abstractmethod
    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """The loss at each position, differentiable in the view's student fields."""
        ...

    def check_cache(self, where: str, cache: CacheFacts) -> None:  # noqa: B027 (most terms can be trained on any)
        """Refuse a cache that this term cannot be trained on."""


@dataclass(frozen=True)
class Distillation(Term):
    """A divergence between teacher and student under a tail treatment (names as in their modules).

    `temperature` is the teacher's, and the student's too unless `student_temperature` is given. The value
    (and so the gradient) is multiplied by both, τ² where they are one, so that the gradient keeps its size as τ
    grows; `temperature_scaling="none"` leaves that out. The last seven are parameters of single divergences.
    """

    divergence: str = "forward_kl"
    tail: str = "tail_bucket"
    temperature: float = 1.0
    student_temperature: float | None = None
    temperature_scaling: str = "squared"
    keep: KeepUncertain | None = None
    beta: float = Parameters().beta
    skew: float = Parameters().skew
    reverse_share: float = Parameters().reverse_share
    head_mass: float = Parameters().head_mass
    head_size: int = Parameters().head_size
    head_weight: float = Parameters().head_weight
    tail_weight: float = Parameters().tail_weight

    def __post_init__(self) -> None:
        check_combination(self.divergence, self.tail)
        check_ranges(self, "loss: ", temperature=TEMPERATURE, student_temperature=TEMPERATURE)
        check_temperature(self.tail, self._temperatures, self.temperature_scaling)
        check_parameters(self.divergence, self._parameters)

    @property
    def _temperatures(self) -> Temperatures:
        apart = self.student_temperature
        return Temperatures(self.temperature, self.temperature if apart is None else apart)

    @property
    def _parameters(self) -> Parameters:
        return Parameters(*(getattr(self, name) for name in Parameters._fields))

    @property
    def view_temperature(self) -> float:
        """1 for `renormalized`: it needs the support's logits alone and divides them itself."""
        return 1.0 if self.tail == "renormalized" else self._temperatures.student

    @property
    def needs_tail_mean(self) -> bool:
        """True for `uniform_tail` alone."""
        return self.tail == "uniform_tail"

    @property
    def needs_vocabulary(self) -> bool:
        """False for `renormalized`, but where positions are selected by the student's entropy."""
        selects = self.keep is not None and self.keep.signal == "student_entropy"
        return self.tail != "renormalized" or selects

    @property
    def positions(self) -> KeepUncertain | None:
        """As given in `keep`."""
        return self.keep

    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """The divergence at each position, in nats, times both temperatures."""
        at = self._temperatures
        factor = at.teacher * at.student if self.temperature_scaling == "squared" else 1.0
        return factor * DIVERGENCES[self.divergence](TAILS[self.tail](view, at), self._parameters)

    def check_cache(self, where: str, cache: CacheFacts) -> None:
        """Refuse what only the cache can tell.

        Raises:
            UsageError: a tail that the cache does not have, or entries that are not what the tail treatment takes.
        """
        if cache.sampled != (self.tail == "sampled"):
            kind = "sampled entries" if cache.sampled else "the likeliest entries"
            instead = "sampled" if cache.sampled else "tail_bucket"
            raise UsageError(f"{where}.tail: {self.tail!r} on a cache of {kind}. Use {instead!r}, or another cache.")
        if self.tail not in ("renormalized", "truncated") and not cache.tail_known:
            raise UsageError(
                f"{where}.tail: {self.tail!r} on a cache whose source did not say what mass its entries have. Use "
                "'renormalized', which compares nothing else, or export with a teacher of your own."
            )
        if self.tail in ("tail_bucket", "uniform_tail", "residual_to_label") and cache.top_k >= cache.vocab_size:
            raise UsageError(
                f"{where}.tail: {self.tail!r} on a cache of all {cache.vocab_size} tokens, which has no tail. "
                "Use 'unnormalized' for the forward forms and 'renormalized' for the others: with K = V both are exact."
            )
        if self.tail == "tail_bucket" and self.temperature not in (1.0, *cache.tail_temperatures):
            raise UsageError(
                f"{where}.temperature: got {self.temperature}, but the cache has the tail at "
                f"{', '.join(map(str, cache.tail_temperatures))} only, and it cannot be had from the entries. "
                "Use tail='renormalized', temperature=1 with a student_temperature, or export that tail."
            )


@dataclass(frozen=True)
class CrossEntropy(Term):
    """−log q(label): the SFT loss. (1 − ε) · that − ε · mean of log q over V + z · log² Z, in nats (nats² the last).

    Label smoothing ε (arXiv 1512.00567) gives every token of the vocabulary ε / V of the target. The z-loss
    (PaLM, arXiv 2204.02311) pulls log Z, the logsumexp of the logits, towards 0. Smoothing costs a pass over V.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, "loss: ", label_smoothing=SHARE_BELOW_1, z_loss=NOT_NEGATIVE)

    @property
    def needs_tail_mean(self) -> bool:
        """True with label smoothing."""
        return self.label_smoothing > 0

    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """The loss of the label at each position."""
        loss = -(1 - self.label_smoothing) * view.student_label
        if self.label_smoothing:
            size = view.tail_size.to(loss.dtype)
            on_support = view.distinct.sum(dim=1)
            mean = view.student_log_probs.where(view.distinct, 0.0).sum(dim=1) + size * view.student_tail_mean
            loss = loss - self.label_smoothing * mean / (size + on_support)
        return loss + self.z_loss * view.student_log_normaliser**2 if self.z_loss else loss


@dataclass(frozen=True)
class Objective:
    """Σ weight · term. `chunk_tokens` positions at a time hold logits of the full vocabulary.

    On a CPU 256 take a quarter less memory than 512, and 1 to 3% more time; a GPU wants more.
    `observe` names numbers that cost more passes over the vocabulary (`OBSERVED`); evaluation asks for them.
    """

    terms: Mapping[str, Term]
    chunk_tokens: int = 256
    observe: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self, "loss.", chunk_tokens=AT_LEAST_1)
        for name, term in self.terms.items():
            if not 0 <= largest(term.weight) < math.inf:
                raise UsageError(f"loss.terms.{name}.weight: got {term.weight}; wanted at least 0, and finite.")
        if all(largest(term.weight) == 0 for term in self.terms.values()):
            raise UsageError("loss.terms: every weight is 0, so nothing would be trained. Give one term a weight.")
        for name in self.observe:
            choose("observe", name, OBSERVED)

    def at(self, step: int, steps: int) -> "Objective":
        """The objective at a step: every scheduled weight resolved."""
        terms = {name: replace(term, weight=at_step(term.weight, step, steps)) for name, term in self.terms.items()}
        return replace(self, terms=terms)

    def weights(self) -> dict[str, float]:
        """The number that each term is multiplied by."""
        return {name: value_of(term.weight) for name, term in self.terms.items()}

    def fitting(self, cache: CacheFacts) -> dict[str, Term]:
        """The terms that a cache can score; held-out text may lie in a cache of another kind than the trained one."""

        def fits(name: str, term: Term) -> bool:
            try:
                term.check_cache(name, cache)
            except UsageError:
                return False
            return True

        return {name: term for name, term in self.terms.items() if fits(name, term)}

    def check_cache(self, cache: CacheFacts) -> None:
        """Refuse terms that cannot be trained on such a cache (a `UsageError` with what to use instead)."""
        for name, term in self.terms.items():
            term.check_cache(f"loss.terms.{name}", cache)

    @property
    def needs_vocabulary(self) -> bool:
        """Whether a pass needs logits of the whole vocabulary, or those of the teacher's entries alone."""
        return bool(self.observe) or any(term.needs_vocabulary for term in self.terms.values())

    def sum_names(self) -> list[str]:
        """Names of the sums that every pass over a batch returns: without the vocabulary fewer."""
        observed = ["loss", *OF_TEACHER]
        if self.needs_vocabulary:
            observed += [*OF_STUDENT, *(name for asked in self.observe for name in OBSERVED[asked])]
        return observed + [f"{name}_loss" for name in self.terms]
