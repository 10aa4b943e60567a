"""The training objective: a weighted sum of named terms, each a loss per position of the same sparse view.

Objective = Σ weight · term
Distillation    divergence(tail treatment(view))    divergences.py, tails.py
CrossEntropy    −log q(label), with label smoothing and z-loss
Auxiliary       values of the student itself, such as the balance of its routers
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.losses.compatibility import check_choice, check_combination, check_parameters, check_temperature
from kd_core.losses.divergences import DIVERGENCES, Parameters
from kd_core.losses.metric_table import EXTRA_METRIC_SUMS, STUDENT_METRICS, TEACHER_METRICS
from kd_core.losses.sparse_view import SparseView
from kd_core.losses.tails import TAILS, Temperatures
from kd_core.losses.term_weights import Weight, max_weight, resolve_weight, resolved_value
from kd_core.losses.token_selection import KeepUncertain
from kd_core.ranges import AT_LEAST_1, NOT_NEGATIVE, SHARE_BELOW_1, TEMPERATURE, check_settings


class CacheFacts(NamedTuple):
    """Properties of a cache that decide which terms can be trained on it.

    `sampled` is true for entries drawn from a proposal. `tail_known` is false where the source of the cache did not
    give the mass that its entries have.
    """

    vocab_size: int
    top_k: int
    tail_temperatures: tuple[float, ...] = (1.0,)
    sampled: bool = False
    tail_known: bool = True


@dataclass(frozen=True)
class Term(ABC):
    """A loss per position, in nats. Its sum enters the objective times `weight` and is logged without the weight."""

    weight: Weight = 1.0

    @property
    def view_temperature(self) -> float:
        """Returns the student temperature of the view that `values` gets. Any but 1 costs a softmax and a buffer."""
        return 1.0

    @property
    def needs_tail_mean(self) -> bool:
        """Returns true if `values` reads `student_tail_mean`, which costs a pass over the vocabulary."""
        return False

    @property
    def needs_vocabulary(self) -> bool:
        """Returns false if `values` reads only the student's logits on the support, up to a constant per position."""
        return True

    @property
    def positions(self) -> KeepUncertain | None:
        """Returns the rule that selects among the scored positions. None selects all."""
        return None

    @abstractmethod
    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """Computes the loss at each position, differentiable in the view's student fields."""
        ...

    def check_cache(self, where: str, cache: CacheFacts) -> None:  # noqa: B027 (most terms can be trained on any)
        """Raises a `UsageError` if this term cannot be trained on the cache. `where` is its path in the graph."""


@dataclass(frozen=True)
class Distillation(Term):
    """A divergence between teacher and student under a tail treatment.

    Args:
        divergence: a name in `DIVERGENCES`.
        tail: a name in `TAILS`.
        temperature: the teacher's, and the student's too unless `student_temperature` is given.
        temperature_scaling: `squared` multiplies the value by both temperatures, τ² where they are equal, so that the
            gradient keeps its size as τ grows. `none` leaves the factor out.
        keep: the rule that selects positions. None selects all.

    All other arguments are parameters of single divergences (`Parameters`).
    """

    divergence: str = "forward_kl"
    tail: str = "tail_bucket"
    temperature: float = 1.0
    student_temperature: float | None = None
    temperature_scaling: Literal["squared", "none"] = "squared"
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
        check_settings(self, "loss: ", temperature=TEMPERATURE, student_temperature=TEMPERATURE)
        check_temperature(self.tail, self._temperatures)
        check_parameters(self.divergence, self._parameters)

    @property
    def _temperatures(self) -> Temperatures:
        student = self.student_temperature
        return Temperatures(self.temperature, self.temperature if student is None else student)

    @property
    def _parameters(self) -> Parameters:
        return Parameters(*(getattr(self, name) for name in Parameters._fields))

    @property
    def view_temperature(self) -> float:
        """Returns the student's temperature, but 1 for a tail that divides the support's logits itself."""
        return 1.0 if TAILS[self.tail].support_only else self._temperatures.student

    @property
    def needs_tail_mean(self) -> bool:
        return TAILS[self.tail].needs_tail_mean

    @property
    def needs_vocabulary(self) -> bool:
        """Returns false for a tail of the support alone, unless positions are selected by the student's entropy."""
        needs_entropy = self.keep is not None and self.keep.signal == "student_entropy"
        return not TAILS[self.tail].support_only or needs_entropy

    @property
    def positions(self) -> KeepUncertain | None:
        return self.keep

    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """Computes the divergence at each position, in nats, times both temperatures if they are scaled."""
        temperatures = self._temperatures
        factor = temperatures.teacher * temperatures.student if self.temperature_scaling == "squared" else 1.0
        events = TAILS[self.tail].function(view, temperatures)
        return factor * DIVERGENCES[self.divergence].function(events, self._parameters)

    def check_cache(self, where: str, cache: CacheFacts) -> None:
        """Checks the tail treatment against the entries of the cache.

        Raises:
            UsageError: the cache does not have the tail, or its entries are not of the kind that the treatment takes.
        """
        tail = TAILS[self.tail]
        # Sampled entries carry importance weights, which only a treatment of samples reads.
        if cache.sampled != tail.sampled:
            kind = "sampled entries" if cache.sampled else "the likeliest entries"
            instead = "sampled" if cache.sampled else "tail_bucket"
            raise UsageError(f"{where}.tail: {self.tail!r} on a cache of {kind}. Use {instead!r}, or another cache.")
        # Without the true mass of the entries, only treatments that renormalise the teacher are defined.
        if tail.needs_mass and not cache.tail_known:
            raise UsageError(
                f"{where}.tail: {self.tail!r} on a cache whose source did not say what mass its entries have. Use "
                "'renormalized', which needs only the entries, or export with a teacher of your own."
            )
        # With K = V there is no tail to treat.
        if tail.needs_tail and cache.top_k >= cache.vocab_size:
            raise UsageError(
                f"{where}.tail: {self.tail!r} on a cache of all {cache.vocab_size} tokens, which has no tail. "
                "Use 'unnormalized' for the forward forms and 'renormalized' for the others: with K = V both are exact."
            )
        # Σ p^(1/τ) over the tail must have been captured when the cache was written.
        if tail.needs_tail and self.temperature not in (1.0, *cache.tail_temperatures):
            raise UsageError(
                f"{where}.temperature: got {self.temperature}, but the cache has the tail at "
                f"{', '.join(map(str, cache.tail_temperatures))} only, and it cannot be computed from the entries. "
                "Use tail='renormalized', temperature=1 with a student_temperature, or export that tail."
            )


@dataclass(frozen=True)
class CrossEntropy(Term):
    """The SFT loss −log q(label), with label smoothing and z-loss:

        −(1 − ε) · log q(label) − ε · mean of log q over V + z · log² Z        in nats, the last term in nats²

    Label smoothing ε (arXiv 1512.00567) gives every token of the vocabulary ε / V of the target, at the cost of a pass
    over the vocabulary. The z-loss (PaLM, arXiv 2204.02311) pulls log Z, the logsumexp of the logits, towards 0.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self, "loss: ", label_smoothing=SHARE_BELOW_1, z_loss=NOT_NEGATIVE)

    @property
    def needs_tail_mean(self) -> bool:
        return self.label_smoothing > 0

    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """Computes the loss of the label at each position."""
        loss = -(1 - self.label_smoothing) * view.student_label
        if self.label_smoothing:
            # Mean of log q over V: the sum over the distinct entries, and tail size times the tail's mean.  [n]
            size = view.tail_size.to(loss.dtype)
            on_support = view.distinct.sum(dim=1)
            mean = view.student_log_probs.where(view.distinct, 0.0).sum(dim=1) + size * view.student_tail_mean
            loss = loss - self.label_smoothing * mean / (size + on_support)
        return loss + self.z_loss * view.student_log_normaliser**2 if self.z_loss else loss


@dataclass(frozen=True)
class Auxiliary(Term):
    """Values of the student itself, one of its `auxiliary_names`, at each position that is not padding.

    Their sum is divided by the scored tokens of the step, as that of every term is.
    """

    name: str = "router_balance"

    @property
    def needs_vocabulary(self) -> bool:
        return False

    def values(self, view: SparseView) -> Float[Tensor, " n"]:
        """Returns 0. A view does not have the values, which `batch_loss` of `training/step.py` adds."""
        return torch.zeros_like(view.teacher_tail)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms: Σ weight · term.

    Args:
        terms: the terms by the names under which their sums are logged.
        chunk_tokens: positions whose logits over the vocabulary are held at a time. None takes 256 on a CPU, and on a
            GPU as many as have 1.25 GiB of logits.
        observe: names in `EXTRA_METRIC_SUMS` of metrics that cost more passes over the vocabulary. Evaluation sets
            them.
    """

    terms: Mapping[str, Term]
    chunk_tokens: int | None = None
    observe: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self, "loss.", chunk_tokens=AT_LEAST_1)
        for name, term in self.terms.items():
            if not 0 <= max_weight(term.weight) < math.inf:
                raise UsageError(f"loss.terms.{name}.weight: got {term.weight}; wanted at least 0, and finite.")
        if all(max_weight(term.weight) == 0 for term in self.terms.values() if not isinstance(term, Auxiliary)):
            raise UsageError("loss.terms: every weight is 0, so nothing would be trained. Give one term a weight.")
        for name in self.observe:
            check_choice("observe", name, EXTRA_METRIC_SUMS)

    def at(self, step: int, steps: int) -> "Objective":
        """Returns the objective with every weight schedule resolved at a step."""
        terms = {
            name: replace(term, weight=resolve_weight(term.weight, step, steps)) for name, term in self.terms.items()
        }
        return replace(self, terms=terms)

    def weights(self) -> dict[str, float]:
        """Returns the factor of each term, after schedules were resolved by `at`."""
        return {name: resolved_value(term.weight) for name, term in self.terms.items()}

    def auxiliary(self) -> dict[str, Auxiliary]:
        """Returns the terms that read the student's own values."""
        return {name: term for name, term in self.terms.items() if isinstance(term, Auxiliary)}

    def fitting(self, cache: CacheFacts) -> dict[str, Term]:
        """Returns the terms that the cache can score. Held-out text may be in a cache of another kind."""

        def fits(name: str, term: Term) -> bool:
            try:
                term.check_cache(name, cache)
            except UsageError:
                return False
            return True

        return {name: term for name, term in self.terms.items() if fits(name, term)}

    def check_cache(self, cache: CacheFacts) -> None:
        """Raises a `UsageError` that names an alternative if a term cannot be trained on the cache."""
        for name, term in self.terms.items():
            term.check_cache(f"loss.terms.{name}", cache)

    @property
    def needs_vocabulary(self) -> bool:
        """Returns false if logits of the teacher's entries suffice, true if all of the vocabulary are needed."""
        return bool(self.observe) or any(term.needs_vocabulary for term in self.terms.values())

    def sum_names(self) -> list[str]:
        """Returns the names of all sums of a pass over a batch. A pass without the vocabulary has fewer."""
        names = ["loss", *TEACHER_METRICS]
        if self.needs_vocabulary:
            names += [*STUDENT_METRICS, *(name for metric in self.observe for name in EXTRA_METRIC_SUMS[metric])]
        return names + [f"{name}_loss" for name in self.terms]
