"""Object collectives: gather Python values, raise one rank's error on all ranks, and assert that all ranks agree."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from kd_core.errors import RemoteError, UsageError
from kd_core.parallel.world import World

R = TypeVar("R")
ABSENT = "nothing"
SHOWN = 60  # characters of a value in a message


def all_gather_values(world: World, value: R, group: dist.ProcessGroup | None = None) -> list[R]:
    """Returns the values of all ranks, by rank."""
    if world.size == 1:
        return [value]
    values: list[R] = [value] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def raise_on_all_ranks(world: World, message: str | None) -> None:
    """Raises on every rank if there is a message, in a way that only the first rank reports it."""
    if message is not None:
        raise UsageError(message) if world.is_first else RemoteError(message)


def run_on_all_ranks(world: World, work: Callable[[], R], group: dist.ProcessGroup | None = None) -> list[R]:
    """Runs `work` on every rank and returns all results, by rank.

    Raises:
        UsageError: `work` failed on some rank. Every rank raises the error of the lowest one that failed.
    """
    result: R | None = None
    message: str | None = None
    try:
        result = work()
    except (UsageError, OSError) as error:
        message = str(error)
    outcomes = all_gather_values(world, (result, message), group)
    failed = [f"rank {rank}: {text}" if rank else text for rank, (_, text) in enumerate(outcomes) if text is not None]
    raise_on_all_ranks(world, failed[0] if failed else None)
    return [value for value, _ in outcomes]  # pyright: ignore[reportReturnType]


def _shorten(value: str | None) -> str:
    if value is None:
        return ABSENT
    return value if len(value) <= SHOWN else value[: SHOWN - 1] + "…"


def describe_difference(facts: list[Mapping[str, str]]) -> str | None:
    """Describes the first fact, by name, in which a rank differs from rank 0, with both values.

    Returns None where all are equal.
    """
    first = facts[0]
    for rank, other in enumerate(facts):
        names = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
        if names:
            more = f" (and in {len(names) - 1} more)" if len(names) > 1 else ""
            expected, got = _shorten(first.get(names[0])), _shorten(other.get(names[0]))
            return f"rank {rank} differs from rank 0 in {names[0]}{more}: {expected} on rank 0, {got} on rank {rank}"
    return None


def assert_ranks_agree(world: World, facts: Mapping[str, str]) -> None:
    """Checks that all ranks have the same facts, such as their settings and hashes of their files.

    Raises:
        UsageError: a rank has other facts. The message names the first such fact and the rank.
    """
    mismatch = describe_difference(all_gather_values(world, facts))
    what_next = "Start every rank with the same command, the same code and the same files."
    raise_on_all_ranks(world, f"{mismatch}. {what_next}" if mismatch else None)
