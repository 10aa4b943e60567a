"""Checks of which divergence goes with which tail, temperature and parameter. Errors name what to use instead."""

from collections.abc import Iterable

from kd_core.errors import UsageError
from kd_core.losses.divergences import DIVERGENCES, PARAMETER_RANGES, Parameters
from kd_core.losses.tails import TAILS, Temperatures
from kd_core.ranges import check_settings

# The divergences that are defined on each tail.
ALLOWED_DIVERGENCES = {name: tail.divergences for name, tail in TAILS.items()}


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
            f"loss: divergence {divergence!r} on tail {tail!r}: {TAILS[tail].reason}. "
            f"Use tail {' or '.join(map(repr, instead))}, or here one of {', '.join(ALLOWED_DIVERGENCES[tail])}."
        )


def check_temperature(tail: str, temperatures: Temperatures) -> None:
    """Raises a `UsageError` if the teacher's entries do not determine its distribution at the temperature."""
    if temperatures.teacher != 1 and not TAILS[tail].tempered:
        raise UsageError(
            f"loss: temperature {temperatures.teacher} on tail {tail!r}: the teacher's entries at another temperature "
            f"need its whole distribution. Use tail 'renormalized', or temperature=1 with student_temperature."
        )


def check_parameters(divergence: str, parameters: Parameters) -> None:
    """Raises a `UsageError` if a parameter is out of its range, or set although the divergence does not use it."""
    default, used = Parameters(), DIVERGENCES[divergence].parameters
    for name, value in parameters._asdict().items():
        check_settings(parameters, "loss: ", **{name: PARAMETER_RANGES[name]})
        if value != getattr(default, name) and name not in used:
            users = [user for user, row in DIVERGENCES.items() if name in row.parameters]
            raise UsageError(f"loss: {name}={value}: {divergence!r} does not use it; {' and '.join(users)} does.")
    # The mixture at α = 1 is the first argument itself, so the divergence is 0 everywhere.
    if "skew" in used and parameters.skew == 1:
        raise UsageError("loss: skew=1 compares a distribution with itself. Use less than 1 (DistiLLM: 0.1).")
