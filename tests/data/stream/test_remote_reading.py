"""Caches in buckets: the rows of a folder, read ahead, kept on this machine, and stopped with a message."""

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from data.storage import object_storage
from data.stream.block_cache import BlockCache
from data.stream.block_reader import DamagedBlockError
from data.stream.collate import Collate
from data.stream.shards import ShardReader
from data.stream.source import Shards
from data.stream.stream import all_batches, training_steps
from kd_core.errors import UsageError
from kd_core.types import Batch
from tests.data.stream.contract import check_stage, same_step
from tests.data.stream.server import Behaviour, is_shard, serving
from tests.patience import patience
from tests.s3 import free_port, hadro, use_server
from tests.tiny import ROW_LENGTH, Tiny


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(object_storage, "FIRST_PAUSE", 0.05)
    monkeypatch.setitem(object_storage.RETRIES, "max_retries", 1)


def _steps(shards: Shards, start_row: int = 0, rank: int = 0, ranks: int = 1) -> Generator[list[Batch]]:
    return training_steps(
        shards, Collate(ROW_LENGTH), seed=3, start_row=start_row, rows_per_step=4, micro_batch=2, rank=rank, ranks=ranks
    )


def _taken(shards: Shards, steps: int, **share: int) -> list[list[Batch]]:
    with closing(_steps(shards, **share)) as stage:
        return list(islice(stage, steps))


def _steps_of_an_epoch(shards: Shards) -> int:
    return -(-shards.order(ROW_LENGTH, 3).rows // 4)


def _blocks_asked(behaviour: Behaviour) -> int:
    return sum(is_shard(name) for name in behaviour.asked)


def _blocks(shards: Shards) -> int:
    return sum(shard.blocks for shard in shards.manifest.shards)


def test_a_bucket_gives_the_batches_of_a_folder(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = free_port()
    use_server(monkeypatch, port)
    with hadro(tiny.root, port, "--error-rate", "0.2", "--fault-seed", "1"):
        remote = Shards("s3://cache/train", block_cache=str(tmp_path / "blocks"))
        local = Shards(str(tiny.train))
        remote.check(remote.manifest.vocab_size, remote.manifest.tokenizer)
        steps = _steps_of_an_epoch(local) + 3
        for rank in range(2):
            both = (_taken(shards, steps, rank=rank, ranks=2) for shards in (remote, local))
            assert all(same_step(one, other) for one, other in zip(*both, strict=True))
        batches = (
            list(all_batches(shards, Collate(ROW_LENGTH), micro_batch=2, rank=0, ranks=1)) for shards in (remote, local)
        )
        assert all(same_step([one], [other]) for one, other in zip(*batches, strict=True))
        _taken(remote, 1)  # threads and files that stay: the event loop, and connections
        check_stage(lambda cursor: _steps(remote, cursor * 4), same_step, 6)


def test_blocks_are_read_side_by_side_before_they_are_needed(tiny: Tiny) -> None:
    with serving(tiny.train) as (url, behaviour):
        shards = Shards(url, prefetch=0, block_cache=None)
        with closing(_steps(shards)) as stage:
            behaviour.delay = 0.1
            next(stage)
            deadline = time.monotonic() + patience(20)
            while _blocks_asked(behaviour) < _blocks(shards):
                assert time.monotonic() < deadline, "not all were asked for, with one step taken"
                time.sleep(0.01)
            assert behaviour.most_at_once > 3
            asked = list(behaviour.asked)
            list(islice(stage, _steps_of_an_epoch(shards) - 1))
            ahead = len(behaviour.asked) - len(asked)
            assert ahead <= _blocks(shards), "blocks of the next epoch alone"


def test_no_more_bytes_than_allowed_are_under_way(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny.train) as (url, behaviour):
        shards = Shards(url, prefetch=0, block_cache=None)
        sizes = [
            block.bytes for shard in range(len(shards.manifest.shards)) for block in shards.manifest.index(shard).blocks
        ]
        monkeypatch.setattr(object_storage, "READ_AHEAD", 3 * max(sizes) + 4000)
        monkeypatch.setattr(object_storage.ObjectStorage, "read_ahead", 3 * max(sizes) + 4000)
        behaviour.delay = 0.02
        with closing(_steps(shards)) as stage:
            list(islice(stage, _steps_of_an_epoch(shards)))
        most = (3 * max(sizes) + 4000) // min(sizes)
        assert 1 < behaviour.most_at_once <= most < len(sizes)


def test_the_second_epoch_asks_for_nothing(tiny: Tiny, tmp_path: Path) -> None:
    kept = str(tmp_path / "blocks")
    with serving(tiny.train) as (url, behaviour):
        shards = Shards(url, block_cache=kept)
        epoch = _steps_of_an_epoch(shards)
        first = _taken(shards, epoch)
        assert _blocks_asked(behaviour) == _blocks(shards)
        again = _taken(Shards(url, block_cache=kept), 2 * epoch)
        assert _blocks_asked(behaviour) == _blocks(shards), "two more epochs, of another process's reader"
        assert all(same_step(one, other) for one, other in zip(first, again, strict=False))
        # A damaged file is dropped and read again, one of another size too.
        files = sorted(path for path in Path(kept).rglob("*") if path.is_file() and len(path.name) == 64)
        assert len(files) == _blocks(shards)
        data = bytearray(files[0].read_bytes())
        data[700] ^= 1
        files[0].write_bytes(data)
        files[1].write_bytes(files[1].read_bytes()[:-1])
        assert all(same_step(*both) for both in zip(first, _taken(shards, epoch), strict=True))
        assert _blocks_asked(behaviour) == _blocks(shards) + 2
        assert files[0].read_bytes() != data


def test_the_disk_is_asked_once_for_each_block_ahead(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looks, look = Counter[str](), BlockCache.has

    def has(cache: BlockCache, sha256: str) -> bool:
        looks[sha256] += 1
        return look(cache, sha256)

    monkeypatch.setattr(BlockCache, "has", has)
    with serving(tiny.train) as (url, _):
        shards = Shards(url, prefetch=0, block_cache=str(tmp_path / "blocks"))
        _taken(shards, _steps_of_an_epoch(shards))
    assert len(looks) == _blocks(shards)
    assert max(looks.values()) <= 2, "in this epoch, and ahead of the next one"


def test_readers_of_one_cache_read_its_tables_once(tiny: Tiny) -> None:
    with serving(tiny.train) as (url, behaviour):
        shards = Shards(url, prefetch=0, block_cache=None)
        for _ in range(2):
            list(all_batches(shards, Collate(ROW_LENGTH), micro_batch=2, rank=0, ranks=1))
        assert behaviour.asked.count("tables.tar") == 1


def test_an_object_that_changed_is_an_error_and_is_never_kept(tiny: Tiny, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(tiny.train, tmp_path / "cache"))
    with serving(cache) as (url, _):
        shards = Shards(url, prefetch=0, block_cache=str(tmp_path / "blocks"))
        shard = cache / shards.manifest.shards[0].name
        data = bytearray(shard.read_bytes())
        data[1500] ^= 1
        shard.write_bytes(data)
        with shards.reader() as reader, pytest.raises(DamagedBlockError, match=f"{shard.name}: damaged: block 0"):
            reader.block((0, 0))
        assert not list((tmp_path / "blocks").rglob("?" * 64))
        shard.write_bytes(data[:600])
        with shards.reader() as reader, pytest.raises(DamagedBlockError, match="the shard has 600 bytes; the manifest"):
            reader.block((0, 0))
        shard.unlink()
        with shards.reader() as reader, pytest.raises(UsageError, match=f"{shard.name}: no such file"):
            reader.block((0, 0))


def test_a_server_that_is_killed_and_started_again_is_waited_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    use_server(monkeypatch, port)
    shards = Shards("s3://cache/train", prefetch=2, block_cache=None, retry_seconds=60)
    wanted = _taken(Shards(str(tiny.train)), 9)
    with hadro(tiny.root, port) as server, closing(_steps(shards)) as stage:
        found = [next(stage)]
        server.kill()
        server.wait()
        with hadro(tiny.root, port):
            found += list(islice(stage, 8))
    assert all(same_step(*both) for both in zip(found, wanted, strict=True))


def test_a_server_that_stays_dead_stops_a_run_in_the_stated_time(tiny: Tiny) -> None:
    with serving(tiny.train) as (url, behaviour):
        shards = Shards(url, block_cache=None, retry_seconds=1)
        reader = shards.reader()
        behaviour.status = 503
        started = time.monotonic()
        with (
            reader,
            pytest.raises(UsageError, match=r"shard-\d+.(tar|index): cannot be .* for \d s: the server answers 503"),
        ):
            reader.block((0, 0))
        assert time.monotonic() - started < patience(5)


@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_stopping_never_hangs(tiny: Tiny, wait: float) -> None:
    with serving(tiny.train) as (url, behaviour):
        behaviour.hang = 100
        reader = ShardReader(url, Shards(url).manifest, 300)
        reader.expect([(0, 0), (1, 0)])
        stopper = threading.Timer(wait, reader.stop)
        stopper.start()
        if not wait:
            stopper.join()
        started = time.monotonic()
        with pytest.raises(UsageError, match=r"shard-000000.tar: block 0: reading was stopped"):
            reader.block((0, 0))
        reader.close()
        stopper.join()
        assert time.monotonic() - started < wait + patience(2)


def test_the_least_recently_used_blocks_leave_first(tmp_path: Path) -> None:
    kept = BlockCache(tmp_path, 10_000)
    names = [f"{number:064x}" for number in range(40)]
    for name in names[:9]:
        kept.put(name, bytes(1000))
    for moment, name in enumerate(names[:9]):
        os.utime(kept.path(name), (moment + 1.0, moment + 1.0))
    assert kept.get(names[0], 1000) == bytes(1000)
    kept.put(names[9], bytes(1000))
    kept.put(names[10], bytes(1000))
    assert kept.has(names[0]), "it was used"
    assert kept.has(names[10])
    assert not kept.has(names[1])
    for name in names[11:]:
        kept.put(name, bytes(1000))
        assert sum(path.stat().st_size for path in tmp_path.rglob("?" * 64)) <= 11_000
    assert kept.get(names[39], 999) is None
    assert not kept.has(names[39]), "one of another size is dropped"


def test_no_file_of_a_user_is_deleted(tmp_path: Path) -> None:
    strangers = [tmp_path / "thesis" / "chapter.tex", tmp_path / "ab" / "notes.partial", tmp_path / "ab" / "photo.jpg"]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(5000))
        os.utime(path, (1, 1))
    cache = BlockCache.from_setting(str(tmp_path), 3000)
    assert cache
    for blocks in (cache, BlockCache(tmp_path, 3000)):
        for number in range(8):
            blocks.put(f"{number:064x}", bytes(1000))
        assert sum(path.stat().st_size for path in blocks.folder.rglob("?" * 64)) <= 6000
    assert all(path.stat().st_size == 5000 for path in strangers)


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            BlockCache(tmp_path / "file", 1000).put("a" * 64, b"x")
    assert caplog.text.count("blocks cannot be kept there") == 1


def test_a_full_disk_costs_half_of_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = BlockCache(tmp_path, 1_000_000)
    for number in range(8):
        kept.put(f"{number:064x}", bytes(1000))

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path), str(target))

    monkeypatch.setattr(Path, "rename", full)
    kept.put("a" * 64, bytes(1000))
    assert sum(path.stat().st_size for path in tmp_path.rglob("?" * 64)) <= 4000
    assert not list(tmp_path.rglob("*.partial"))


WRITER = """
import os, random, sys
from pathlib import Path
from data.stream.block_cache import BlockCache
kept, random = BlockCache(Path(sys.argv[1]), 40_000), random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    number = random.randrange(100)
    name = f"{number:064x}"
    data = kept.get(name, 1000 + number)
    assert data is None or data == bytes([number]) * (1000 + number), name
    if data is None:
        kept.put(name, bytes([number]) * (1000 + number))
"""


def test_processes_that_share_a_folder_and_are_killed_leave_whole_blocks(tmp_path: Path) -> None:
    for attempt in range(3):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(10 * attempt + number)],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for number in range(2)
        ]  # fmt: skip
        for writer in writers:
            assert writer.stdout
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        for writer in writers:
            assert writer.poll() is None, "it found other bytes"
            writer.kill()
            writer.communicate()
    blocks = list(tmp_path.rglob("?" * 64))
    assert blocks
    for path in blocks:
        number = int(path.name, 16)
        assert path.read_bytes() == bytes([number]) * (1000 + number)
    assert sum(path.stat().st_size for path in blocks) < 50_000
