"""Which divergence goes with which tail, temperature and parameter; the others are refused, with what to use."""

from collections.abc import Iterable

from kd_core.errors import UsageError
from kd_core.losses.divergences import DIVERGENCES, Parameters
from kd_core.losses.tails import TAILS, Temperatures
from kd_core.ranges import AT_LEAST_1, NOT_NEGATIVE, SHARE, check_ranges

# What sums teacher-weighted terms alone can do without the events that a tail treatment leaves out.
TEACHER_WEIGHTED = ("forward_kl", "cross_entropy", "skew_kl")
ALLOWED: dict[str, tuple[str, ...]] = {
    "tail_bucket": tuple(DIVERGENCES),
    "renormalized": tuple(name for name in DIVERGENCES if name != "decoupled_kl"),
    "truncated": TEACHER_WEIGHTED,
    "unnormalized": TEACHER_WEIGHTED,
    "uniform_tail": ("forward_kl",),
    "residual_to_label": ("forward_kl", "cross_entropy"),
    "sampled": ("forward_kl", "cross_entropy"),
}
REASONS = {
    "renormalized": "most of the tail that it weighs apart is not there",
    "truncated": "it weighs events by the student, whose mass outside the entries this tail leaves out",
    "unnormalized": "it weighs events by the student, whose mass outside the entries this tail leaves out",
    "uniform_tail": "the guessed tail is known on average only, which forward KL alone can use",
    "residual_to_label": "a teacher with all its tail on the label is a target for the forward forms alone",
    "sampled": "importance weights estimate sums over the teacher, which the forward forms alone are",
}
# At τ ≠ 1 the teacher's other tails would need probabilities that the entries do not hold.
TEACHER_TEMPERATURE = ("tail_bucket", "renormalized", "truncated")
USES = {
    "jsd": ("beta",),
    "skew_kl": ("skew",),
    "skew_reverse_kl": ("skew",),
    "mixed_kl": ("reverse_share",),
    "adaptive_kl": ("head_mass",),
    "decoupled_kl": ("head_size", "head_weight", "tail_weight"),
}
RANGES = {"head_size": AT_LEAST_1, "head_weight": NOT_NEGATIVE, "tail_weight": NOT_NEGATIVE}


def choose(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known."""
    if name not in known:
        raise UsageError(f"loss: {what} {name!r} is unknown; wanted one of {', '.join(sorted(known))}.")


def check_combination(divergence: str, tail: str) -> None:
    """Refuse a divergence on a tail that it makes no sense on."""
    choose("divergence", divergence, DIVERGENCES)
    choose("tail", tail, TAILS)
    if divergence not in ALLOWED[tail]:
        instead = [name for name in ("tail_bucket", "renormalized") if divergence in ALLOWED[name]]
        raise UsageError(
            f"loss: divergence {divergence!r} on tail {tail!r}: {REASONS[tail]}. "
            f"Use tail {' or '.join(map(repr, instead))}, or here one of {', '.join(ALLOWED[tail])}."
        )


def check_temperature(tail: str, at: Temperatures, scaling: str) -> None:
    """Refuse a teacher's temperature that its entries cannot give."""
    choose("temperature_scaling", scaling, ("squared", "none"))
    if at.teacher != 1 and tail not in TEACHER_TEMPERATURE:
        raise UsageError(
            f"loss: temperature {at.teacher} on tail {tail!r}: the teacher's entries at another temperature need "
            f"its whole distribution. Use tail 'renormalized', or temperature=1 with student_temperature."
        )


def check_parameters(divergence: str, parameters: Parameters) -> None:
    """Refuse a parameter out of its range, or one that this divergence does not use."""
    default = Parameters()
    for name, value in parameters._asdict().items():
        check_ranges(parameters, "loss: ", **{name: RANGES.get(name, SHARE)})
        if value != getattr(default, name) and name not in USES.get(divergence, ()):
            users = [user for user, names in USES.items() if name in names]
            raise UsageError(f"loss: {name}={value}: {divergence!r} does not use it; {' and '.join(users)} does.")
    if "skew" in USES.get(divergence, ()) and parameters.skew == 1:
        raise UsageError("loss: skew=1 compares a distribution with itself. Use less than 1 (DistiLLM: 0.1).")
