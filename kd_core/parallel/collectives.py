"""What ranks tell each other in words: results and errors of work that each does, and proof that all stand alike."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from kd_core.errors import EchoedError, UsageError
from kd_core.parallel.world import World

R = TypeVar("R")
ABSENT = "nothing"
SHOWN = 60  # characters of a value in a message


def gathered(world: World, value: R, group: dist.ProcessGroup | None = None) -> list[R]:
    """Every rank's value, by rank."""
    if world.size == 1:
        return [value]
    found: list[R] = [value] * world.size
    dist.all_gather_object(found, value, group=group)
    return found


def stop_alike(world: World, message: str | None) -> None:
    """Raise on every rank where there is a message, so that the first alone says it."""
    if message is not None:
        raise UsageError(message) if world.is_first else EchoedError(message)


def together(world: World, work: Callable[[], R], group: dist.ProcessGroup | None = None) -> list[R]:
    """Run `work` on every rank; every rank gets all results, or stops with the error of the lowest rank that failed."""
    result: R | None = None
    message: str | None = None
    try:
        result = work()
    except (UsageError, OSError) as error:
        message = str(error)
    found = gathered(world, (result, message), group)
    failed = [f"rank {rank}: {said}" if rank else said for rank, (_, said) in enumerate(found) if said is not None]
    stop_alike(world, failed[0] if failed else None)
    return [value for value, _ in found]  # pyright: ignore[reportReturnType]


def _shortened(value: str | None) -> str:
    if value is None:
        return ABSENT
    return value if len(value) <= SHOWN else value[: SHOWN - 1] + "…"


def difference(facts: list[Mapping[str, str]]) -> str | None:
    """The first fact, by name, in which a rank differs from rank 0, with both values; None where all are equal."""
    first = facts[0]
    for rank, other in enumerate(facts):
        names = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
        if names:
            more = f" (and in {len(names) - 1} more)" if len(names) > 1 else ""
            there, here = _shortened(first.get(names[0])), _shortened(other.get(names[0]))
            return f"rank {rank} differs from rank 0 in {names[0]}{more}: {there} on rank 0, {here} on rank {rank}"
    return None


def prove_same(world: World, facts: Mapping[str, str]) -> None:
    """Have all ranks compare what they go by.

    Raises:
        UsageError: a rank has other facts; named by fact and rank.
    """
    found = difference(gathered(world, facts))
    what_next = "Start every rank with the same command, the same code and the same files."
    stop_alike(world, f"{found}. {what_next}" if found else None)
