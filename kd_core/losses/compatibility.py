"""Checks of which divergence goes with which tail, temperature and parameter. Errors name what to use instead."""

from collections.abc import Iterable

from kd_core.errors import UsageError
from kd_core.losses.divergences import DIVERGENCES, Parameters
from kd_core.losses.tails import TAILS, Temperatures
from kd_core.ranges import AT_LEAST_1, NOT_NEGATIVE, SHARE, check_settings

# Divergences whose terms are all weighted by p. They need nothing of events that a tail treatment leaves out.
TEACHER_WEIGHTED = ("forward_kl", "cross_entropy", "skew_kl")
# The divergences that are defined on each tail.
ALLOWED_DIVERGENCES: dict[str, tuple[str, ...]] = {
    "tail_bucket": tuple(DIVERGENCES),
    "renormalized": tuple(name for name in DIVERGENCES if name != "decoupled_kl"),
    "truncated": TEACHER_WEIGHTED,
    "unnormalized": TEACHER_WEIGHTED,
    "uniform_tail": ("forward_kl",),
    "residual_to_label": ("forward_kl", "cross_entropy"),
    "sampled": ("forward_kl", "cross_entropy"),
}
# Why a tail allows no other divergence, for the error message.
REASONS = {
    "renormalized": "most of the tail that it weighs separately is missing",
    "truncated": "it weighs events by the student, and this tail leaves out the student's mass outside the entries",
    "unnormalized": "it weighs events by the student, and this tail leaves out the student's mass outside the entries",
    "uniform_tail": "the guessed tail is known only on average, which only forward KL can use",
    "residual_to_label": "a teacher with all its tail on the label is a target for the forward forms only",
    "sampled": "importance weights estimate sums over the teacher, and only the forward forms are such sums",
}
# Tails that allow a teacher at τ ≠ 1. The others would need probabilities that the entries do not hold.
TEMPERED_TAILS = ("tail_bucket", "renormalized", "truncated")
# The parameters that each divergence uses.
USED_PARAMETERS = {
    "jsd": ("beta",),
    "skew_kl": ("skew",),
    "skew_reverse_kl": ("skew",),
    "mixed_kl": ("reverse_share",),
    "adaptive_kl": ("head_mass",),
    "decoupled_kl": ("head_size", "head_weight", "tail_weight"),
}
# Ranges of parameters that are not shares, which lie in 0 to 1.
PARAMETER_RANGES = {"head_size": AT_LEAST_1, "head_weight": NOT_NEGATIVE, "tail_weight": NOT_NEGATIVE}


def check_choice(setting: str, name: str, choices: Iterable[str]) -> None:
    """Raises a `UsageError` if a name is not one of the choices."""
    if name not in choices:
        raise UsageError(f"loss: {setting} {name!r} is unknown; wanted one of {', '.join(sorted(choices))}.")


def check_combination(divergence: str, tail: str) -> None:
    """Raises a `UsageError` if the divergence is not defined on the tail."""
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("tail", tail, TAILS)
    if divergence not in ALLOWED_DIVERGENCES[tail]:
        instead = [name for name in ("tail_bucket", "renormalized") if divergence in ALLOWED_DIVERGENCES[name]]
        raise UsageError(
            f"loss: divergence {divergence!r} on tail {tail!r}: {REASONS[tail]}. "
            f"Use tail {' or '.join(map(repr, instead))}, or here one of {', '.join(ALLOWED_DIVERGENCES[tail])}."
        )


def check_temperature(tail: str, temperatures: Temperatures) -> None:
    """Raises a `UsageError` if the teacher's entries do not determine its distribution at the temperature."""
    if temperatures.teacher != 1 and tail not in TEMPERED_TAILS:
        raise UsageError(
            f"loss: temperature {temperatures.teacher} on tail {tail!r}: the teacher's entries at another temperature "
            f"need its whole distribution. Use tail 'renormalized', or temperature=1 with student_temperature."
        )


def check_parameters(divergence: str, parameters: Parameters) -> None:
    """Raises a `UsageError` if a parameter is out of its range, or set although the divergence does not use it."""
    default = Parameters()
    for name, value in parameters._asdict().items():
        check_settings(parameters, "loss: ", **{name: PARAMETER_RANGES.get(name, SHARE)})
        if value != getattr(default, name) and name not in USED_PARAMETERS.get(divergence, ()):
            users = [user for user, names in USED_PARAMETERS.items() if name in names]
            raise UsageError(f"loss: {name}={value}: {divergence!r} does not use it; {' and '.join(users)} does.")
    # The mixture at α = 1 is the first argument itself, so the divergence is 0 everywhere.
    if "skew" in USED_PARAMETERS.get(divergence, ()) and parameters.skew == 1:
        raise UsageError("loss: skew=1 compares a distribution with itself. Use less than 1 (DistiLLM: 0.1).")
