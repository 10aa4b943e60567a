"""Caches behind URLs: the same batches as from a folder; what dies is an error with its cause; no command is run."""

import shutil
from itertools import islice
from pathlib import Path

import pytest

from data.cache import storage
from data.cache.storage import RemoteFile, is_url, storage_at
from data.stream.collate import Collate
from data.stream.shards import ShardReader
from data.stream.source import Shards
from data.stream.stream import all_batches, training_steps
from kd_core.errors import UsageError
from tests.data.stream.server import serving
from tests.forks import child_processes
from tests.tiny import ROW_LENGTH, Tiny

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http with curl")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize(
    "path",
    ["pipe:touch ran", "pipe:cat x |", "htgs://a/b", "hf://datasets/a/b", "s3://a/b", "file:///etc", "PIPE:touch ran",
     "Http://a/b", "http:a", "http://", "http://a/{b,c}", "http://a/[1-9]", "https://me:secret@a/b", "http://a/b?c=d",
     "http://a/b#c", "gs://a/$(b)", "gs://a/b c", "gs://a/*", "http://a/../b", "https://-o/b", "a:b"],
)  # fmt: skip
def test_only_plain_urls_of_known_schemes_are_let_through(path: str) -> None:
    with pytest.raises(UsageError, match="wanted"):
        Shards(path)


@pytest.mark.parametrize("path", ["a/b", "/a:b", "./a:b", "https://a.b:80/c-d/e_f.g", "gs://bucket/x", "ais://b/x"])
def test_folders_and_plain_urls_are_places(path: str) -> None:
    assert is_url(path) == (not path.startswith((".", "/", "a/")))


def test_the_environment_cannot_have_something_else_opened(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", "/=pipe:touch ran; /")
    with pytest.raises(UsageError, match="GOPEN_REWRITE is set"):
        tiny.records()


@needs_curl
def test_a_remote_cache_gives_the_batches_of_a_local_one(tiny: Tiny) -> None:
    with serving(tiny.root) as (url, behaviour):
        remote = Shards(f"{url}/cache/train/")
        remote.check(remote.manifest.vocab_size, remote.manifest.tokenizer)
        behaviour.asked.clear()
        both = [
            [
                batch.tokens.tolist()
                for batch in all_batches(shards, Collate(ROW_LENGTH), micro_batch=2, rank=0, ranks=1)
            ]
            for shards in (remote, Shards(str(tiny.train)))
        ]
        assert both[0] == both[1]
        names = [shard.name for shard in remote.manifest.shards]
        assert behaviour.asked == ["tables.tar", *names], "each shard is asked for once"


@needs_curl
def test_a_block_further_on_is_reached_by_reading_and_an_earlier_one_by_beginning_again(tiny: Tiny) -> None:
    with serving(tiny.train) as (url, behaviour):
        manifest = Shards(url).manifest
        shard = max(range(len(manifest.shards)), key=lambda s: len(manifest.shards[s].blocks))
        last = len(manifest.shards[shard].blocks) - 1
        assert last > 0
        with ShardReader(url, manifest) as remote, ShardReader(tiny.train, manifest) as local:
            for block in (last, 0):
                found, wanted = (reader.block((shard, block)) for reader in (remote, local))
                assert [r.token_ids.tolist() for r in found] == [r.token_ids.tolist() for r in wanted]
        assert behaviour.asked.count(manifest.shards[shard].name) == 2


@needs_curl
def test_a_transfer_that_dies_is_begun_again_a_few_times(tiny: Tiny) -> None:
    with serving(tiny.train) as (url, behaviour):
        behaviour.cut_short = 2
        with ShardReader(url, Shards(url).manifest) as reader:
            assert len(reader.block((0, 0))) > 0
        behaviour.cut_short = 100
        wanted = r"shard-000000.tar: cannot be read \(4 attempts\): curl ended with status 18 .*ended early"
        with ShardReader(url, Shards(url).manifest) as reader, pytest.raises(UsageError, match=wanted):
            reader.block((0, 0))
        assert behaviour.cut_short == 96


@needs_curl
def test_what_is_not_there_is_an_error_at_once(tiny: Tiny) -> None:
    with serving(tiny.train) as (url, behaviour):
        with pytest.raises(UsageError, match=r"none/manifest.json: cannot be read: curl .* status 22 .*404"):
            _ = Shards(f"{url}/none").manifest
        assert len(behaviour.asked) == 1
    with pytest.raises(UsageError, match=r"cannot be read \(4 attempts\): curl .* status 7 .*no connection"):
        _ = Shards(url).manifest


@needs_curl
def test_a_shard_that_is_shorter_on_the_server_is_damaged(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.train, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    wanted = "shard-000000.tar: damaged: block 0: the shard ends after 600 bytes"
    with serving(tmp_path / "cache") as (url, _), pytest.raises(UsageError, match=wanted):
        next(ShardReader(url, Shards(url).manifest).records())


@needs_curl
def test_tables_and_manifest_of_another_size_are_not_read_to_the_end(tiny: Tiny) -> None:
    with serving(tiny.train) as (url, _), pytest.raises(UsageError, match="has more than 10 bytes"):
        storage_at(url).read("tables.tar", 10)


@needs_curl
def test_leaving_in_the_middle_ends_the_transfer(tiny: Tiny) -> None:
    before = child_processes()
    with serving(tiny.root) as (url, _):
        batches = all_batches(Shards(f"{url}/cache/train"), Collate(ROW_LENGTH), micro_batch=2, rank=0, ranks=1)
        list(islice(batches, 2))
        batches.close()
        ahead = training_steps(
            Shards(f"{url}/cache/train"), Collate(ROW_LENGTH), seed=0, start_row=0, rows_per_step=2, micro_batch=2,
            rank=0, ranks=1,
        )  # fmt: skip
        list(islice(ahead, 2))
        ahead.close()
        assert child_processes() <= before


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="'gsutil', which opens such URLs, is not installed"):
        RemoteFile("gs://bucket/x").read(0, 1)
