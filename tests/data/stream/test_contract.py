"""Every stateful stage passes the one contract, and shares its rows over ranks."""

import shutil
import threading
from collections.abc import Generator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from data.stream.collate import Collate
from data.stream.shards import DamagedBlockError
from data.stream.source import Mixture, Shards, Source
from data.stream.stream import all_batches, training_steps
from kd_core.errors import UsageError
from kd_core.types import Batch
from tests.data.stream.contract import check_stage, same_step
from tests.data.stream.server import serving
from tests.tiny import ROW_LENGTH, Tiny

STEPS, ROWS = 14, 6


@pytest.fixture(scope="module")
def damaged(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training cache with two damaged blocks."""
    folder = tmp_path_factory.mktemp("damaged") / "cache"
    shutil.copytree(tiny.train, folder)
    for shard in ("shard-000000.tar", "shard-000001.tar"):
        payload = bytearray((folder / shard).read_bytes())
        payload[700] ^= 1
        (folder / shard).write_bytes(payload)
    return folder


def _source(kind: str, tiny: Tiny, damaged: Path) -> Source:
    if kind == "skipping":
        return Shards(str(damaged), on_damage="skip", max_damaged_blocks=2, shuffle_shards=2)
    prefetch = 3 if kind == "read ahead" else 0
    shards = partial(Shards, str(tiny.train), shuffle_shards=2, prefetch=prefetch)
    if kind == "mixture":
        caches = {"all": shards(), "narrow": shards(top_k=3), "other": Shards(str(tiny.validation))}
        return Mixture(caches, {"all": 5, "narrow": 2, "other": 1})
    return shards()


def _steps(source: Source, first: int, rank: int = 0, ranks: int = 1, rows: int = ROWS) -> Generator[list[Batch]]:
    return training_steps(
        source, Collate(ROW_LENGTH), seed=3, start_row=first * rows, rows_per_step=rows, micro_batch=2,
        rank=rank, ranks=ranks,
    )  # fmt: skip


def _names(step: list[Batch]) -> list[str]:
    return [name for batch in step for name in batch.record_names]


def _scored(step: list[Batch]) -> int:
    return sum(int(batch.loss_mask.sum()) for batch in step)


def _damaged_blocks(step: list[Batch]) -> int:
    return sum(batch.damaged_blocks for batch in step)


KINDS = ["shards", "read ahead", "mixture", "skipping"]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_a_function_of_their_cursor(kind: str, tiny: Tiny, damaged: Path) -> None:
    source = _source(kind, tiny, damaged)
    epoch = sum(1 for _ in source.parts[0].rows(ROW_LENGTH, 3, 0))
    assert epoch < STEPS * ROWS / 2, "the test should cross an epoch's end"
    check_stage(lambda cursor: _steps(source, cursor), same_step, STEPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_same_global_step(kind: str, ranks: int, tiny: Tiny, damaged: Path) -> None:
    source = _source(kind, tiny, damaged)
    every = [_steps(source, 0), *(_steps(source, 0, rank, ranks) for rank in range(ranks))]
    for _ in range(4):
        alone, *shared = [next(steps) for steps in every]
        assert sorted(_names(alone)) == sorted(name for step in shared for name in _names(step))
        assert _damaged_blocks(alone) == sum(_damaged_blocks(step) for step in shared)
    for steps in every:
        steps.close()


def test_reading_ahead_changes_nothing(tiny: Tiny, damaged: Path) -> None:
    one, other = (_steps(_source(kind, tiny, damaged), 0) for kind in ("shards", "read ahead"))
    with closing(one), closing(other):
        assert all(same_step(next(one), next(other)) for _ in range(STEPS))


def test_the_reading_thread_pins_every_tensor_where_it_is_asked_to(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU build of torch has no page-locked memory, so the call is noted in its place."""
    pinned = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert threading.current_thread().name == "reading ahead"
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    asked = {"rows_per_step": ROWS, "micro_batch": 2}
    with closing(training_steps(Shards(str(tiny.train)), Collate(ROW_LENGTH), **asked, pin_memory=True)) as steps:
        batches = next(steps)
    values = [value for batch in batches for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(values) >= 9 * len(batches) > 0
    assert all(any(value is tensor for tensor in pinned) for value in values)
    pinned.clear()
    with closing(training_steps(Shards(str(tiny.train)), Collate(ROW_LENGTH), **asked)) as steps:
        next(steps)
    assert not pinned


def test_what_is_damaged_is_left_out_and_counted_once_an_epoch(tiny: Tiny, damaged: Path) -> None:
    shards = _source("skipping", tiny, damaged)
    assert isinstance(shards, Shards)
    shards.check(shards.manifest.vocab_size, shards.manifest.tokenizer)
    epoch = sum(1 for _ in shards.rows(ROW_LENGTH, 3, 0))
    whole, left = (_steps(_source(kind, tiny, damaged), 0, rows=epoch) for kind in ("shards", "skipping"))
    with closing(whole), closing(left):
        for _ in range(2):
            one, other = next(whole), next(left)
            assert [batch.tokens.shape for batch in one] == [batch.tokens.shape for batch in other]
            lost = [r for shard in range(2) for r in shards.manifest.block(shard, 0).lengths]
            assert len(_names(one)) - len(_names(other)) == len(lost)
            assert _scored(one) - _scored(other) == sum(lost)
            assert _damaged_blocks(other) == 2


def test_more_damage_than_allowed_stops_and_names_all_of_it(damaged: Path) -> None:
    steps = _steps(Shards(str(damaged), on_damage="skip", max_damaged_blocks=1, shuffle_shards=2), 0)
    with closing(steps), pytest.raises(UsageError, match=r"2 damaged blocks; wanted at most 1") as caught:
        list(islice(steps, STEPS))
    assert all(f"{shard}: damaged: block 0" in str(caught.value) for shard in ("shard-000000.tar", "shard-000001.tar"))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_damage_stops_by_default_and_always_in_evaluation(damaged: Path, prefetch: int) -> None:
    steps = _steps(Shards(str(damaged), prefetch=prefetch), 0)
    with closing(steps), pytest.raises(DamagedBlockError, match=r"shard-00000\d.tar: damaged: block 0"):
        list(islice(steps, STEPS))
    batches = all_batches(Shards(str(damaged), on_damage="skip"), Collate(ROW_LENGTH), micro_batch=2, rank=0, ranks=1)
    with closing(batches), pytest.raises(DamagedBlockError):
        list(batches)


def test_a_server_that_hangs_is_an_error_that_says_what_was_waited_for(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(tiny.train) as (url, behaviour):
        behaviour.hang = 1
        steps = _steps(Shards(url, timeout=0.5, block_cache=None), 0)
        with closing(steps), pytest.raises(UsageError, match=r"waited \d s .* is still at http.*/shard-.*: block 0"):
            next(steps)
        assert "reading ahead" not in {thread.name for thread in threading.enumerate()}
