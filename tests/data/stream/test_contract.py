"""Every stateful stage passes the one contract, and shares its rows over ranks."""

from collections.abc import Generator
from functools import partial

import pytest

from data.stream.collate import Collate
from data.stream.source import Mixture, Shards, Source
from data.stream.stream import training_steps
from kd_core.types import Batch
from tests.data.stream.contract import check_stage, same_step
from tests.tiny import ROW_LENGTH, Tiny

STEPS, ROWS = 14, 6


def _source(kind: str, tiny: Tiny) -> Source:
    shards = partial(Shards, str(tiny.train), shuffle_shards=2)
    if kind == "mixture":
        caches = {"all": shards(), "narrow": shards(top_k=3), "other": Shards(str(tiny.validation))}
        return Mixture(caches, {"all": 5, "narrow": 2, "other": 1})
    return shards()


def _steps(source: Source, first: int, rank: int = 0, ranks: int = 1) -> Generator[list[Batch]]:
    return training_steps(
        source, Collate(ROW_LENGTH), seed=3, start_row=first * ROWS, rows_per_step=ROWS, micro_batch=2,
        rank=rank, ranks=ranks,
    )  # fmt: skip


KINDS = ["shards", "mixture"]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_a_function_of_their_cursor(kind: str, tiny: Tiny) -> None:
    source = _source(kind, tiny)
    epoch = sum(1 for _ in source.parts[0].rows(ROW_LENGTH, 3, 0))
    assert epoch < STEPS * ROWS / 2, "the test should cross an epoch's end"
    check_stage(lambda cursor: _steps(source, cursor), same_step, STEPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_same_global_step(kind: str, ranks: int, tiny: Tiny) -> None:
    source = _source(kind, tiny)
    every = [_steps(source, 0), *(_steps(source, 0, rank, ranks) for rank in range(ranks))]
    for _ in range(4):
        alone, *shared = (sorted(name for batch in next(steps) for name in batch.record_names) for steps in every)
        assert sorted(name for names in shared for name in names) == alone
    for steps in every:
        steps.close()
