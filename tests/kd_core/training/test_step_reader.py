"""The reader of steps: an error of the data waits until ranks have agreed, and a rank that stops reads no further."""

from collections.abc import Generator, Sequence
from typing import cast

import pytest

from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.training.checkpoints.checkpoint import Progress
from kd_core.training.monitoring.hang_watchdog import Pulse
from kd_core.training.step_reader import StepReader
from kd_core.types import Batch


class Quiet:
    def enter(self, _: str) -> None:
        pass


@pytest.mark.parametrize("error", [UsageError("no data"), OSError(5, "Input/output error")])
def test_an_error_of_the_data_waits_until_all_ranks_have_saved(error: Exception) -> None:
    def steps_from(_: int) -> Generator[Sequence[Batch]]:
        yield ()
        raise error

    with StepReader(steps_from, Progress(), 5, cast(Pulse, Quiet())) as reader:
        reader.read_next()
        assert reader.error is error
        with pytest.raises(UsageError, match="Step 1 is saved, and the same command goes on from there"):
            reader.raise_error(World(), 1)
